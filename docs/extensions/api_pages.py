"""Pages of the reference: one for each public package, and one for each name in its `__all__`.

The pages are written before Sphinx reads its sources, from the packages themselves, so that no name can be missing. A
name that several packages export has one page, under the first of them. Code in text that is the name of something
public becomes a link to its page.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from plain_docstrings import escaped
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGES = {
    "What comes out, without PyTorch": [
        "bayeslm",
        "bayeslm.diagnostics",
        "bayeslm.advice",
        "bayeslm.reliability",
        "bayeslm.bounds",
        "bayeslm.calibration",
        "bayeslm.decisions",
        "bayeslm.moments",
        "bayeslm.weights",
        "bayeslm.plots",
        "bayeslm.report",
        "bayeslm.summaries",
    ],
    "What to infer": [
        "bayeslm.models",
        "bayeslm.models.rewards",
        "bayeslm.models.lm",
        "bayeslm.models.samplers",
        "bayeslm.models.preferences",
        "bayeslm.models.control",
    ],
    "How to infer it": [
        "bayeslm.inference",
        "bayeslm.inference.training",
        "bayeslm.inference.sequential",
        "bayeslm.inference.markov",
        "bayeslm.inference.preferences",
        "bayeslm.inference.control",
        "bayeslm.inference.program",
    ],
}


def public_names(module: ModuleType) -> list[str]:
    """Return the names in ``__all__``, or, of a module of the face without it, those that it defines."""
    if hasattr(module, "__all__"):
        return sorted((n for n in module.__all__ if not n.startswith("__")), key=str.casefold)
    own = vars(module).items()
    return sorted(n for n, x in own if not n.startswith("_") and getattr(x, "__module__", None) == module.__name__)


def homes() -> dict[str, dict[str, str]]:
    """Return by package its names, each with the full name under which it is documented."""
    first: dict[str, str] = {}
    pages: dict[str, dict[str, str]] = {}
    for package in (package for group in PACKAGES.values() for package in group):
        module = importlib.import_module(package)
        pages[package] = {}
        for name in public_names(module):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                documented = inspect.isclass(thing) or inspect.isroutine(thing)
                key = f"{thing.__module__}.{thing.__qualname__}" if documented else f"{package}.{name}"
                pages[package][name] = first.setdefault(key, f"{package}.{name}")
    return pages


def by_name() -> dict[str, str]:
    """Return the full names of what is public, by their last part; of functions that share one there is none."""
    found: dict[str, set[str]] = {}
    for names in homes().values():
        for name, full in names.items():
            found.setdefault(name, set()).add(full)
    return {name: min(full) for name, full in found.items() if len(full) == 1}


def _section(title: str, mark: str) -> list[str]:
    return [title, mark * len(title), ""]


def write(folder: Path) -> None:
    """Write the pages of the packages into a folder, and an index of them; what has not changed is left as it is."""
    pages = {"index": _index()}
    for package, names in homes().items():
        module = importlib.import_module(package)
        own = [name for name, full in names.items() if full == f"{package}.{name}"]
        elsewhere = [full for name, full in names.items() if name not in own]
        lines = [*_section(package, "="), f".. automodule:: {package}", "   :no-members:", ""]
        kinds = {
            "Classes": [n for n in own if inspect.isclass(getattr(module, n))],
            "Functions": [n for n in own if inspect.isroutine(getattr(module, n))],
        }
        kinds["Data and types"] = [n for n in own if not any(n in names for names in kinds.values())]
        for kind, members in kinds.items():
            if members:
                lines += _section(kind, "-")
                lines += [".. autosummary::", "   :toctree: generated", "   :nosignatures:", ""]
                lines += [*(f"   {name}" for name in members), ""]
        if elsewhere:
            lines += _section("Also exported here", "-")
            lines += [", ".join(f":py:obj:`~{full}`" for full in elsewhere) + ".", ""]
        pages[package] = "\n".join(lines)
    folder.mkdir(exist_ok=True)
    wanted = {f"{name}.rst": text for name, text in pages.items()}
    for file in folder.glob("*.rst"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")
    fulls = {full for names in homes().values() for full in names.values()}
    if any(page.stem not in fulls for page in (folder / "generated").glob("*.rst")):
        shutil.rmtree(folder / "generated")  # pages of names that are gone would be orphans


def _index() -> str:
    lines = [*_section("Reference", "="), "Everything public, from the docstrings.", ""]
    for group, packages in PACKAGES.items():
        lines += _section(group, "-")
        lines += [".. toctree::", "   :maxdepth: 1", "", *(f"   {package}" for package in packages), ""]
        lines += [".. list-table::", "   :widths: 30 70", ""]
        for package in packages:
            first = (importlib.import_module(package).__doc__ or "").split("\n\n")[0].replace("\n", " ")
            lines += [f"   * - :doc:`{package}`", f"     - {escaped(first)}"]
        lines += [""]
    return "\n".join(lines)


def link_code(app: Sphinx, tree: nodes.document) -> None:
    """Make code in text that is a public name, as `SVI` or `Posterior.best`, a link to its page."""
    known = app.env.api_names  # type: ignore[attr-defined]
    for paragraph in [p for p in tree.findall(nodes.paragraph) if p.astext() == "Bases: object"]:
        paragraph.parent.remove(paragraph)
    for literal in list(tree.findall(nodes.literal)):
        text = literal.astext().removesuffix("()")
        parents = (nodes.reference, addnodes.pending_xref, nodes.title, addnodes.desc_signature)
        head, *rest = text.split(".")
        if not head[:1].isupper() or head not in known or any(isinstance(p, parents) for p in _parents(literal)):
            continue
        target = ".".join([known[head], *rest])
        xref = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target, refexplicit=True)
        literal.replace_self(xref)
        xref += literal


def _parents(node: nodes.Node) -> list[Any]:
    found = []
    while (node := node.parent) is not None:
        found.append(node)
    return found


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element) -> Any:
    """Resolve a reference from a docstring by the last name, as class names are unique in the project."""
    if node.get("refdomain") != "py":
        return None
    head, *rest = node["reftarget"].removeprefix(".").split(".")
    full = env.api_names.get(head)  # type: ignore[attr-defined]
    if full is None or node["reftarget"].startswith("bayeslm."):
        return None
    domain = env.domains.python_domain
    target = ".".join([full, *rest])
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def _remember(app: Sphinx) -> None:
    app.env.api_names = by_name()  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what the module's docstring says."""
    app.connect("builder-inited", _remember)
    app.connect("doctree-read", link_code)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
