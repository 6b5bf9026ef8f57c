"""The working directory of a command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.models import tiny_llama

from bayeslm.cli import comparison


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A model on disk, which is faster to copy than to save."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_llama(scale=1.0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(request, saved_model, tmp_path, monkeypatch) -> Path:
    """A working directory with a model and the test file's `MODULES` of functions, by name."""
    shutil.copytree(saved_model, tmp_path / "model")
    for name, source in request.module.MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch) -> None:
    """Draw no results for tests without `pictures`: it takes longer than runs as small as theirs."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(comparison, "_save_plots", lambda posteriors, out: [])
