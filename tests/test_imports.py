"""What imports bring along: a look into `sys.modules` of new processes, since seconds depend on the machine."""

import json
import subprocess
import sys

import pytest

NOT_IN_THE_FACE = {"torch", "pyro", "scipy", "pandas", "xarray", "arviz", "matplotlib"}
NETWORKS = {"transformers", "peft", "tokenizers", "accelerate", "huggingface_hub"}  # of no use for tables and control
OF_OTHERS = {"pandas", "xarray", "arviz", "matplotlib", "scipy", "sklearn", "gymnasium", "pyarrow", "tensorboard"}
STAGES = {
    "import bayeslm": NOT_IN_THE_FACE | NETWORKS | OF_OTHERS | {"rich", "typer"},
    "import bayeslm.cli; help()": NOT_IN_THE_FACE | NETWORKS | OF_OTHERS,
    "import bayeslm.models; import bayeslm.inference": NETWORKS | OF_OTHERS,
    "import bayeslm.inference.training, bayeslm.inference.sequential": NETWORKS | OF_OTHERS,
    # which registers an environment with gymnasium
    "import bayeslm.inference.control, bayeslm.inference.preferences": NETWORKS | OF_OTHERS - {"gymnasium"},
}
LISTS = """
import contextlib, io, json, sys
def help():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        bayeslm.cli.app(["--help"])
found = {}
for stage in json.loads(sys.argv[1]):
    exec(stage)
    found[stage] = sorted(sys.modules)
print(json.dumps(found))
"""
LAZY = """
import random, sys
import numpy, torch
import bayeslm.inference
from bayeslm.models import LanguageModel
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = states()
LanguageModel.tabular(["<eos>", "a", "b"])
import scipy.special
import peft, peft.tuners.lora, peft.utils.other, peft.tuners.tuners_utils
import transformers.modeling_layers
from transformers import get_scheduler, PreTrainedTokenizerFast, AutoModelForCausalLM
assert states() == before, "an import has drawn random numbers"
"""


def in_new_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def modules() -> dict[str, set[str]]:
    """The packages that a process has imported after each of the stages, one after another."""
    found = json.loads(in_new_process(LISTS, json.dumps(list(STAGES))))
    return {stage: {name.partition(".")[0] for name in names} for stage, names in found.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_imports_bring_only_what_everybody_needs(modules, stage):
    assert sorted(STAGES[stage] & modules[stage]) == []


def test_the_names_are_those_of_packages_that_are_there(modules):
    """A name that is spelled wrongly would be absent from every process."""
    import importlib.util

    assert {"torch", "pyro", "rich", "typer", "numpy"} <= set.union(*modules.values())
    names = NOT_IN_THE_FACE | NETWORKS | (OF_OTHERS - {"gymnasium", "pyarrow", "tensorboard", "sklearn"})  # extras
    assert not [name for name in names if importlib.util.find_spec(name) is None]


@pytest.mark.long
def test_what_is_imported_in_a_run_does_not_move_its_random_numbers():
    in_new_process(LAZY)
