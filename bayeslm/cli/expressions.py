"""Settings as text, written as in Python: ``svi(num_steps=200, optimizer=Adam(1e-3))``. Nothing of it is executed.

A text is parsed by `ast`, and these are understood, nothing else: numbers, strings, True, False, None, lists, tuples,
dictionaries, calls of the names that the caller allows, and names alone, which are strings (``twist=partial``). Of
rewards also sums, differences and multiples.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

LONGEST = 20_000  # characters of a text
CALL = re.compile(r"\s*[A-Z]\w*\s*\(.*\)\s*", re.DOTALL)  # a string in a settings file that is a call
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def evaluate(
    text: str,
    makers: Mapping[str, Callable[..., Any]],
    *,
    values: Mapping[str, Any] | None = None,
    operand: type | None = None,
) -> Any:
    """Return the value of an expression.

    :param makers: what may be called, by name.
    :param values: what other names than strings stand for.
    :param operand: the class of what may be added, subtracted, and multiplied by numbers. It is made of a name alone.
    :raises ValueError: if the text is not such an expression, or a name is unknown, with the nearest one.
    """
    return _within(text, lambda: _Evaluator(makers, values or {}, operand).of(_parsed(text)))


def calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and settings of ``name, name(setting=value), ...``.

    A value that has no calls is itself, and one with calls is their text, as in a settings file.

    :raises ValueError: if the text is no list of names and calls, or a call has arguments without names.
    """
    return _within(text, lambda: [_call(node) for node in _parsed(f"{text},", ast.Tuple).elts])


def nearest(name: str, names: Collection[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest of some names, or a full stop."""
    close = difflib.get_close_matches(name.lower(), {x.lower(): x for x in names}, n=1, cutoff=0.5)
    return f", did you mean {next(x for x in names if x.lower() == close[0])!r}?" if close else "."


def check_names(owner: str, target: Callable[..., Any], settings: Iterable[str]) -> None:
    """Check that a function or a class has settings of these names.

    :raises ValueError: if it lacks one, with the nearest and all that it has.
    """
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in settings:
        if name not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise ValueError(f"{owner} has no setting {name!r}{nearest(name, parameters)} Its settings are {allowed}")


def _within(text: str, work: Callable[[], Any]) -> Any:
    """Do the work on a text, whose depth may be more than Python allows."""
    try:
        return work()
    except (RecursionError, MemoryError):
        raise ValueError(f"{text:.60} is nested too deeply") from None


def _parsed(text: str, kind: type[ast.AST] = ast.expr) -> Any:
    """Return the tree of an expression."""
    if len(text) > LONGEST:
        raise ValueError(f"{text:.60}... has {len(text)} characters, more than {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown escapes such as "\d"
            node = ast.parse(f"({text.strip()}\n)", mode="eval").body
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"{text.rstrip(',')!r:.60} is not written as in Python: {reason}") from None
    if not isinstance(node, kind):
        raise ValueError(
            f"{text.rstrip(',')!r:.60} must be one or several of NAME and NAME(SETTING=VALUE), with commas"
        )
    return node


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"{ast.unparse(node)!r:.60} must be a name or a call such as svi(num_steps=200)")
    if node.args:
        raise ValueError(f"{ast.unparse(node):.60}: write settings by their names, as in svi(num_steps=200)")
    return node.func.id, {name: _in_file(value) for name, value in _keywords(node)}


def _in_file(node: ast.expr) -> Any:
    """Return a value as it stands in a settings file."""
    if isinstance(node, ast.Call):
        text = ast.unparse(node)
        if not (isinstance(node.func, ast.Name) and CALL.fullmatch(text)):
            raise ValueError(f"{text!r:.60} is not understood: objects are written as Adam(learning_rate=1e-3)")
        return text
    if isinstance(node, ast.List | ast.Tuple):
        return [_in_file(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return _mapping(node, _key_in_file, _in_file)
    return _Evaluator({}, {}, None).of(node)


def _keywords(node: ast.Call) -> list[tuple[str, ast.expr]]:
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"{ast.unparse(node)!r:.60} has ** in it: write settings by their names")
    names = [str(keyword.arg) for keyword in node.keywords]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{ast.unparse(node)!r:.60} repeats {twice!r}")
    return list(zip(names, (keyword.value for keyword in node.keywords), strict=True))


def _key_in_file(node: ast.expr) -> str:
    """Return a key as a settings file allows it, a text.

    :raises ValueError: if it is none.
    """
    key = _in_file(node)
    if not isinstance(key, str):
        raise ValueError(f"{ast.unparse(node)!r:.60} is a key that is no text: write it in quotes")
    return key


def _mapping(node: ast.Dict, key_of: Callable[[ast.expr], Any], value_of: Callable[[ast.expr], Any]) -> dict[Any, Any]:
    """Return a dictionary with every entry that is written.

    :raises ValueError: if a key is neither a constant nor a name, or is repeated.
    """
    found: dict[Any, Any] = {}
    for key_node, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key_node, ast.Constant | ast.Name):
            said = "**" if key_node is None else ast.unparse(key_node)
            raise ValueError(f"{ast.unparse(node)!r:.60}: {said:.20} is no key: write each key as a text in quotes")
        key = key_of(key_node)
        if key in found:
            raise ValueError(f"{ast.unparse(node)!r:.60}: the key {key!r:.20} is repeated")
        found[key] = value_of(value)
    return found


class _Evaluator:
    def __init__(
        self, makers: Mapping[str, Callable[..., Any]], values: Mapping[str, Any], operand: type | None
    ) -> None:
        self._makers, self._values, self._operand = makers, values, operand

    def of(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return self._made(name, [], {}) if self._operand is not None else self._values.get(name, name)
            case ast.List(elts=elements):
                return [self.of(element) for element in elements]
            case ast.Tuple(elts=elements):
                return tuple(self.of(element) for element in elements)
            case ast.Dict():
                return _mapping(node, self.of, self.of)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                keywords = {keyword: self._setting(value) for keyword, value in _keywords(node)}
                return self._made(name, [self._setting(argument) for argument in arguments], keywords)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
                value = self._number_or_operand(inner)
                return -value if isinstance(sign, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right) if self._operand is not None and type(op) in OPERATORS:
                return OPERATORS[type(op)](self._number_or_operand(left), self._number_or_operand(right))
        raise ValueError(f"{ast.unparse(node)!r:.60} is not understood: write a number, a text in quotes, or a call")

    def _setting(self, node: ast.expr) -> Any:
        """Return an argument, where a name alone is a string."""
        return node.id if isinstance(node, ast.Name) and node.id not in self._makers else self.of(node)

    def _number_or_operand(self, node: ast.expr) -> Any:
        value = self.of(node)
        kinds: tuple[type, ...] = (int, float) if self._operand is None else (int, float, self._operand)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{ast.unparse(node)!r:.60} is no number{' or reward' if self._operand else ''}")
        return value

    def _made(self, name: str, arguments: list[Any], settings: dict[str, Any]) -> Any:
        maker = self._makers.get(name)
        if maker is None:
            names = [x for x in self._makers if x[0] != "_" and (x == x.lower() or x.lower() not in self._makers)]
            allowed = ", ".join(names) or "none"
            raise ValueError(f"{name!r} is unknown{nearest(name, self._makers)} Allowed names: {allowed}")
        check_names(name, maker, settings)
        return maker(*arguments, **settings)
