"""Check who imports whom, on the syntax trees of the sources: nothing of the project is imported.

    python docs/check_imports.py        (make imports)

1. Imports go down the floors of `FLOORS`, and the face imports no torch.
2. There is no circle of modules. Imports under ``TYPE_CHECKING``, inside functions and by a written name
   (``import_module("...")``) count.
3. From another room only names in the ``__all__`` of its package are imported, absolutely; files of the face are public
   modules. Inside a room imports are relative.

import-linter was tried first: its contracts are about modules, so it cannot check the names of rule 3.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"bayeslm": "bayeslm", "bayeslm.models": "models", "bayeslm.inference": "inference"}
FACE = "bayeslm"
FLOORS = [  # rooms from top to bottom, by the names of their packages; a new room needs its place here
    ["bayeslm.__main__"],
    ["bayeslm.cli"],
    ["bayeslm.inference.preferences"],  # its acquisitions use the exploration strategies of control
    ["bayeslm.inference.control"],
    ["bayeslm.inference"],  # the engines
    ["bayeslm.inference.training", "bayeslm.inference.sequential", "bayeslm.inference.markov"],
    ["bayeslm.inference.program"],
    ["bayeslm.models.preferences", "bayeslm.models.control"],
    ["bayeslm.models"],  # the ready program
    ["bayeslm.models.samplers"],
    ["bayeslm.models.lm", "bayeslm.models.rewards"],
    [FACE],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NOT_IN_THE_FACE = {"torch", "pyro", "transformers", "peft"}


@dataclass(frozen=True)
class Import:
    """One import statement's ``names`` from ``target``; no names where the module itself is imported."""

    importer: str
    target: str
    names: tuple[str, ...]
    relative: bool
    line: int

    @property
    def at(self) -> str:
        return f"{modules()[self.importer].relative_to(ROOT)}:{self.line}"


@cache
def modules() -> dict[str, Path]:
    """Every module of the project and its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def room(module: str) -> str:
    """The package that a module belongs to; a package belongs to itself, and ``python -m bayeslm`` stands alone."""
    return module if module in FLOOR else module.rpartition(".")[0]


@cache
def exports(package: str) -> set[str]:
    """The names in a package's ``__all__``."""
    for node in tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _last_name(function: ast.expr) -> str:
    return getattr(function, "attr", None) or getattr(function, "id", "")


def imports(module: str) -> Iterator[Import]:
    """Every import in a module, of the project or not, wherever it stands."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, (), False, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            public = exports(source) if source in modules() and source != module else set()
            inner = [x.name for x in node.names if f"{source}.{x.name}" in modules() and x.name not in public]
            for name in inner:  # `from package import module`
                yield Import(module, f"{source}.{name}", (), node.level > 0, node.lineno)
            names = tuple(x.name for x in node.names if x.name not in inner)
            if names:
                yield Import(module, source, names, node.level > 0, node.lineno)
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            for name in node.args[:1]:
                if isinstance(name, ast.Constant):  # `import_module("package.module")`
                    yield Import(module, str(name.value), (), False, node.lineno)


def against_the_floors(found: Import) -> str | None:
    """What is wrong with an import by rule 1."""
    here, there = room(found.importer), room(found.target)
    if here == there or FLOOR[here] < FLOOR[there]:
        return None
    way = "up" if FLOOR[here] > FLOOR[there] else "sideways"
    return f"{here} imports {way} from {there}: move what both need to a lower floor, or pass it as an argument"


def past_the_exports(found: Import) -> str | None:
    """What is wrong with an import by rule 3."""
    here, there = room(found.importer), room(found.target)
    names = found.names or (found.target.removeprefix(f"{there}."),)
    what = ", ".join(names)
    if here == there:
        return None if found.relative or here == FACE else f"{found.target} is in the same room: import it relatively"
    if found.relative and not there.startswith(f"{here}."):
        return f"{there} is another room: import absolutely, from {there} import {what}"
    if there == FACE and not any(name.startswith("_") for name in names if name not in exports(FACE)):
        return None
    if found.target != there:
        return f"{found.target} is an inner file of {there}: from {there} import {what}, each in its __all__"
    private = ", ".join(name for name in found.names if name not in exports(there))
    return f"{private}: not in the __all__ of {there}: add what is public there, or do without" if private else None


def circles(found: list[Import]) -> Iterator[str]:
    """Circles of modules, each with the imports that close it; those against the floors are left out."""
    graph: dict[str, dict[str, Import]] = {module: {} for module in modules()}
    for each in found:
        if against_the_floors(each) is None:
            graph[each.importer].setdefault(each.target, each)
    while True:
        try:
            return TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            steps = [graph[a][b] for b, a in pairwise(circle)][::-1]
            way = ", which imports ".join(f"{step.target} ({step.at})" for step in steps)
            yield f"{steps[0].at}: a circle: {steps[0].importer} imports {way}: move what both need into a third module"
            del graph[steps[0].importer][steps[0].target]


def violations() -> list[str]:
    """Every violation, as ``file:line: what is wrong: what to do``."""
    every = [each for module in modules() for each in imports(module)]
    ours = [each for each in every if each.target in modules()]
    problems = [(each, rule(each)) for each in ours for rule in (against_the_floors, past_the_exports)]
    problems += [
        (each, f"the face imports {each.target}: it must work without, so move this to models or inference")
        for each in every
        if room(each.importer) == FACE and each.target.split(".")[0] in NOT_IN_THE_FACE
    ]
    return [f"{each.at}: {problem}" for each, problem in problems if problem] + list(circles(ours))


if __name__ == "__main__":
    found = violations()
    print("\n".join(found) or f"imports: {len(modules())} modules in order", file=sys.stderr if found else sys.stdout)
    sys.exit(bool(found))
