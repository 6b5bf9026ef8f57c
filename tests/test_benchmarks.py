"""Benchmarks and examples are run by hand, and seldom: here, that none has lost what it imports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("[a-z]*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_script_can_be_imported(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
        assert callable(module.main)
    finally:
        for name in set(sys.modules) - before:  # neighbours in another folder may have the same names
            if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == path.parent:
                del sys.modules[name]
