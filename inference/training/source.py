"""The source code of functions and classes, and the values outside on which it depends."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import FunctionType, ModuleType
from typing import Any

MISSING = object()


def is_own(module: str | None) -> bool:
    """Return whether a module is the user's own code, and not installed, Python's own, or bayeslm's."""
    package = (module or "").partition(".")[0]
    if package == "bayeslm" or package in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(PurePath(file).parts)


def source_of(value: Any) -> tuple[str, ast.AST]:
    """Return the source of a function or class, and its syntax tree.

    :raises OSError: if there is none.
    """
    # of a function's own code, where `functools.wraps` would lead to that of another
    code = value.__code__ if isinstance(value, FunctionType) else value
    if getattr(value, "__name__", None) != "<lambda>":
        source = textwrap.dedent(inspect.getsource(code))
        try:
            return source, ast.parse(source)
        except IndentationError:  # text at the margin, which cannot be dedented
            return source, ast.parse(f"if True:\n{source}")
    lines, _ = inspect.findsource(code)
    file = "".join(lines)
    nodes = [x for x in ast.walk(ast.parse(file)) if isinstance(x, ast.Lambda) and x.lineno == code.co_firstlineno]
    if len(nodes) > 1:  # on one line: the positions of instructions tell which one it is
        at = [(line, start) for line, _, start, end in code.co_positions() if line and end]
        nodes = [x for x in nodes if at and _start(x) <= min(at) and max(at) <= (x.end_lineno, x.end_col_offset)]
    segment = ast.get_source_segment(file, max(nodes, key=_start)) if nodes else None
    if segment is None:
        raise OSError("a lambda whose source cannot be separated from other lambdas of its line")
    return segment, ast.parse(f"({segment})")


def _start(node: ast.Lambda) -> tuple[int, int]:
    return node.lineno, node.col_offset


def assigned_outside(tree: ast.AST) -> set[str]:
    """Return the names of outer variables that code assigns itself: what it remembers, and not what it depends on."""
    return {x for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal) for x in node.names}


def values_named(tree: ast.AST, scope: Mapping[str, Any], package: str) -> dict[str, Any]:
    """Return the values that names in a syntax tree have in a scope, attributes of modules as ``module.name``.

    :param package: of the module, from which relative imports inside functions start.
    """
    nodes = list(_evaluated(tree))
    scope = {**scope, **_imported(nodes, package)}
    found: dict[str, Any] = {}
    for node in nodes:
        name = _dotted(node)
        first, *attributes = name.split(".") if name else [""]
        value = scope.get(first, MISSING)
        for attribute in attributes:
            is_module = isinstance(value, ModuleType) and is_own(value.__name__)  # others are in the source by name
            value = getattr(value, attribute, MISSING) if is_module else MISSING
        if value is not MISSING and not isinstance(value, ModuleType):
            found[name] = value
    return found


def _dotted(node: ast.AST) -> str:
    """Return a name or a chain of attributes of one as text; nothing for another expression."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := _dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def _imported(nodes: list[ast.AST], package: str) -> dict[str, Any]:
    """Return what import statements in a function give names: own modules, and names of theirs."""
    found: dict[str, Any] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if module := _own_module(alias.name):
                    found[alias.asname or alias.name.partition(".")[0]] = (
                        module if alias.asname else _own_module(alias.name.partition(".")[0])
                    )
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            module = _own_module(name, package)
            for alias in node.names if module else ():
                value = getattr(module, alias.name, MISSING)
                found[alias.asname or alias.name] = (
                    _own_module(f"{module.__name__}.{alias.name}") if value is MISSING and module else value
                )
    return found


def _own_module(name: str, package: str = "") -> ModuleType | None:
    """Return one of the user's modules, imported if the code that names it has not run; None if it is not one."""
    with contextlib.suppress(Exception):  # an import that fails is reported where the code runs
        name = importlib.util.resolve_name(name, package)
        if name not in sys.modules:
            found = importlib.util.find_spec(name.partition(".")[0])
            if found is None or {"site-packages", "dist-packages"} & set(PurePath(found.origin or "").parts):
                return None
        return importlib.import_module(name) if is_own(name) else None
    return None


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Return a syntax tree's nodes, but those of annotations, which differ between versions of Python, and decorators.

    A decorator has been applied: what it made of the function is identified itself.
    """
    yield node
    for field, child in ast.iter_fields(node):
        for each in child if isinstance(child, list) else [child]:
            if field not in ("annotation", "returns", "decorator_list") and isinstance(each, ast.AST):
                yield from _evaluated(each)
