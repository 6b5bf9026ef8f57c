"""The commands `bayeslm engines` and `bayeslm rewards`: what there is, from docstrings and signatures."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from .console import UsageError, one_line_errors, out_console
from .expressions import nearest

FIELD = re.compile(r"^:(param (?P<name>\w+)|\w+[^:]*):(?P<text>.*(\n[ \t]+.*)*)", re.MULTILINE)
Name = Annotated[list[str] | None, typer.Argument(help="Names of which to print the settings. Default: all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def engines(name: Name = None, as_json: AsJson = False) -> None:
    """List the engines and their settings, and the objects that settings may be.

    Defaults are those of Python; an engine without a seed of its own has that of infer's --seed.
    """
    with one_line_errors():
        from bayeslm.inference import ENGINES

        from .engines import Run, makers

        _print(ENGINES | makers(Run()), name, as_json)


def rewards(name: Name = None, as_json: AsJson = False) -> None:
    """List the built-in rewards and their settings."""
    with one_line_errors():
        from bayeslm.models.rewards import BUILT_IN, Reward

        _print(BUILT_IN | {"Reward": Reward}, name, as_json)


def entry(name: str, target: Callable[..., Any]) -> dict[str, Any]:
    """Return what the docstring and the signature of a class say."""
    from bayeslm.validation import annotations_of, meaning

    text = inspect.getdoc(target) or ""
    classes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    fields = [found for x in reversed(classes) for found in FIELD.finditer(inspect.getdoc(x) or "") if found["name"]]
    said = {found["name"]: " ".join(found["text"].split()) for found in fields}
    hints = annotations_of(inspect.unwrap(target))
    settings = []
    for key, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        required = parameter.default is parameter.empty
        default = None if required else _default(target, key, parameter.default)
        settings.append(
            {
                "name": key,
                "required": required,
                "default": default,
                "allowed": meaning(hints[key]) if key in hints else "anything",
                "description": said.get(key, ""),
            }
        )
    return {"name": name, "class": target.__name__, "description": _first_sentence(text), "settings": settings}


def _print(found: Mapping[str, Any], names: list[str] | None, as_json: bool) -> None:
    by_class = {target.__name__: name for name, target in found.items()}
    for name in names or ():
        if name not in found and name not in by_class:
            raise UsageError(f"{name!r} is unknown{nearest(name, found)} Allowed names: {', '.join(found)}")
    chosen = [name if name in found else by_class[name] for name in names] if names else list(found)
    entries = [entry(name, found[name]) for name in chosen]
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
        return
    for one in entries:
        title = one["name"] if one["name"] == one["class"] else f"{one['name']} ({one['class']})"
        out_console.print(f"{title}: {one['description']}", style="bold")
        for setting in one["settings"]:
            default = "" if setting["required"] else f" = {_shown(setting['default'])}"
            out_console.print(
                f"    {setting['name']}{default}   [{setting['allowed']}]   {setting['description']}".rstrip()
            )


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def _default(target: Any, name: str, value: Any) -> Any:
    """Return a default as JSON: its value, or its text in Python."""
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        value = target.__dataclass_fields__[name].default_factory()
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return getattr(value, "__name__", None) or repr(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value[:1].isupper() else repr(value)
