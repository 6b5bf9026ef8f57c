"""Models on their way to the Hugging Face hub, a small server on the loopback, and back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.hub import COMMIT, hub
from support.models import tiny_llama

from bayeslm.models import LanguageModel

PROMPT, COMPLETION = [1, 2, 3], [[5, 6, 2]]
PROGRAM = """
import json, sys, torch
from bayeslm.models import LanguageModel

source, name = sys.argv[1:]
address = LanguageModel.from_pretrained(source).push_to_hub(name, private=True, commit_message="First")
back = LanguageModel.from_pretrained(name)
score = back([[1, 2, 3]], 3).log_prob(torch.tensor([[5, 6, 2]])).item()
policy = back.policy(2)  # on a base that is on the hub
policy.push_to_hub("me/adapter")
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

networks = AutoModelForCausalLM.from_pretrained(name), AutoPeftModelForCausalLM.from_pretrained("me/adapter")
ids = torch.tensor([[1, 2, 3, 5, 6, 2]])
scores = [network.eval()(input_ids=ids).logits.log_softmax(-1)[0, 2:-1] for network in networks]
plain = [x.gather(-1, ids[0, 3:, None]).sum().item() for x in scores]
print(json.dumps([address, score, *plain]))
"""


@pytest.mark.long
def test_a_model_goes_to_the_hub_and_back(tmp_path):
    """In a process of its own, whose hub is the server: huggingface_hub reads HF_ENDPOINT once."""
    lm = tiny_llama(eos_token_ids=(0, 7))
    lm.save_pretrained(tmp_path / "model")
    with hub() as server:
        environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        environment |= {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), "me/policy"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    address, *scores = json.loads(done.stdout.splitlines()[-1])
    expected = lm([PROMPT], 3).log_prob(torch.tensor(COMPLETION)).item()
    assert scores == pytest.approx([expected] * 3, abs=1e-5)
    assert address == f"{server.address}/me/policy/commit/{COMMIT}"
    assert server.repos["me/policy"].get("private") or server.repos["me/policy"].get("visibility") == "private"
    assert server.messages[0] == "First"
    assert server.tokens == {"Bearer hf_secret"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    # the ends given by hand are in generation_config.json, and so in the network that was loaded
    assert server.files["me/policy"].keys() == written.keys() - {"bayeslm.json"}
    assert server.files["me/policy"]["model.safetensors"] == written["model.safetensors"]
    adapter = json.loads(server.files["me/adapter"]["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "me/policy"
    assert b"base_model: me/policy" in server.files["me/adapter"]["README.md"]


@pytest.mark.parametrize("base", ["a folder", "an object"])
def test_an_adapter_on_what_nobody_else_has_is_not_pushed(tmp_path, base):
    lm = tiny_llama()
    if base == "a folder":
        lm.save_pretrained(tmp_path / "base")
        lm = LanguageModel.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"where nobody else finds it: .* policy\.merged\(\)\.push_to_hub"):
        lm.policy(2).push_to_hub("me/policy")
