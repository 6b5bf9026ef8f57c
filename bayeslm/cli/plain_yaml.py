"""Settings files: YAML without anchors, aliases, tags and repeated keys, which is data and nothing else.

Words are read as YAML 1.2 and JSON read them: ``1e-3`` is a number; yes, no, on, off, 1:30 and dates are strings.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES, MAX_DEPTH = 2**24, 50
WORDS = {  # what a plain word is, by its tag, and the characters with which such words begin
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r:.60} must be a text", problem_mark=_at(node, i))
            if key in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"key {key!r:.60} is there twice", problem_mark=_at(node, i))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes in quotes what either version of YAML reads as something else than a string."""


for _tag, (_pattern, _first) in WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def _at(node: Any, i: int) -> Any:
    return node.value[i][0].start_mark


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings in a file.

    :raises ValueError: if it is not plain YAML, or no mapping; with the file and the line.
    :raises OSError: if it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a settings file")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the settings file in it, such as {path / 'run.yaml'}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES // 2**20} MB: put prompts into a file of their own")
    try:
        _check_events(data)
        found = yaml.load(data, _Loader)  # it is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of the encoding, too many digits
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a mapping of settings, such as 'beta: 0.1', and is {found!r:.60}")
    return found


def write_yaml(settings: dict[str, Any]) -> str:
    """Return settings as YAML that `read_yaml` reads; nothing in them is a reference to another part."""
    text: str = yaml.dump(settings, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=118)
    return text


def _check_events(data: bytes) -> None:
    """Refuse references, tags and depth before anything is built."""
    depth = 0
    for event in yaml.parse(data, _Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = f"{event.anchor!r:.60} is an anchor or alias: write the value itself"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag!r:.60} is not allowed: write plain values"
        elif depth > MAX_DEPTH:
            problem = "nested too deeply"
        else:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            continue
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
