"""The working directory of a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.models import tiny_llama


@pytest.fixture
def folder(request, tmp_path, monkeypatch) -> Path:
    """A working directory with a model and the test file's `MODULES` of functions, by name."""
    tiny_llama(scale=1.0).save_pretrained(tmp_path / "model")
    for name, source in request.module.MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path
