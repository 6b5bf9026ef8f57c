"""Policies in vLLM, served by its OpenAI interface on the loopback: an adapter, and merged weights (make test-vllm)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.inference.training import ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import loading
from bayeslm.models.lm.adapters import own_parameters
from bayeslm.models.samplers import VLLMServer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs an environment of its own: make test-vllm"),
]
PROMPTS = ["My dinner at the restaurant was", "The capital of France is", "Yes"]
CHAT = [{"role": "user", "content": "Say hello."}]
PATIENCE = 900  # seconds until a server answers


class Server:
    """vLLM's OpenAI interface."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, place: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + place, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]

    def log_probs(self, model: str, ids: list[int]) -> list[float]:
        """Return the log-probability of each token after the first."""
        asked = {"model": model, "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0.0}
        return self.ask("/v1/completions", **asked)["logprobs"]["token_logprobs"][1 : len(ids)]

    def answer(self, model: str) -> str:
        asked = {"model": model, "messages": CHAT, "max_tokens": 12, "temperature": 0.0}
        return self.ask("/v1/chat/completions", **asked)["message"]["content"]


@contextlib.contextmanager
def served(log: Path, model: str, *options: str) -> Iterator[Server]:
    """Serve a folder for the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", *options]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(PATIENCE):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                time.sleep(1)
            else:
                raise TimeoutError(log.read_text()[-3000:])
            yield Server(address)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def policy(smollm2, tmp_path_factory) -> tuple[LanguageModel, Path]:
    """A policy with large adapters, and the folder that holds it, as an adapter and merged."""
    folder = tmp_path_factory.mktemp("policy")
    policy = smollm2.policy(lora_rank=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in own_parameters(policy.network):
            p.add_(0.01 * torch.randn_like(p))
    policy.save_pretrained(folder / "adapter")
    policy.merged().save_pretrained(folder / "merged")
    return policy, folder


def assert_same(server: Server, model: str, lm: LanguageModel) -> None:
    """Assert that texts have the same log-probabilities, token by token, and a chat the same likeliest answer."""
    largest = 0.0
    for prompt in PROMPTS:
        x = lm([prompt], 12).sample((4,))[:, 0]
        before = lm.encode_prompts([prompt]).ids[0].tolist()
        scores = lm([prompt] * len(x), 12).token_log_prob(x)
        for row, expected in zip(x.tolist(), scores, strict=True):
            length = next((t + 1 for t, token in enumerate(row) if token in lm.eos_token_ids), len(row))
            found = torch.tensor(server.log_probs(model, before + row[:length])[len(before) - 1 :])
            largest = max(largest, float((found - expected[:length]).abs().max()))
    print(f"{model}: the largest difference of a token's log-probability is {largest:.1e}")
    assert largest < 1e-4
    ((answer,),) = lm.generate_texts([CHAT], max_new_tokens=12, temperature=1e-4, seed=0)
    assert server.answer(model).strip() == answer.strip()


def test_an_adapter_is_served_beside_its_base(smollm2, policy, tmp_path):
    lm, folder = policy
    adapter = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"policy={folder / 'adapter'}")
    base = loading.location("smollm2")
    with served(tmp_path / "log", base, "--served-model-name", "base", *adapter) as server:
        assert_same(server, "policy", lm)
        assert_same(server, "base", smollm2)


def test_a_merged_export_is_served(policy, tmp_path):
    lm, folder = policy
    with served(tmp_path / "log", str(folder / "merged"), "--served-model-name", "merged") as server:
        assert_same(server, "merged", lm)


# -- drawing by the server -----------------------------------------------------------------------------------------

DRAWING = ("--logprobs-mode", "processed_logprobs")


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of a text's letters that are vowels."""
    return [sum(x in "aeiou" for x in text.lower()) / max(len(text), 1) for text in completions]


def test_draws_of_the_server_agree_with_our_own(smollm2, policy, tmp_path, monkeypatch):
    """log Z by both within errors; a policy reaches the server as an adapter; and one is trained by its draws."""
    lm, _ = policy
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    base = loading.location("smollm2")
    with served(
        tmp_path / "log", base, "--served-model-name", "base", "--enable-lora", "--max-lora-rank", "16", *DRAWING
    ) as server:
        program = TiltedLM(smollm2, reward, 0.05, max_new_tokens=8)
        engine = ImportanceSampling(num_particles=128, seed=0, progress=False)
        own = engine.run(program, PROMPTS)
        by_server = VLLMServer(f"{server.address}/v1")
        try:
            smollm2.sampler = lm.sampler = by_server
            found = engine.run(program, PROMPTS)
            print("difference and ESS:", found.stats["sampler_difference"], found.stats["sampler_ess"])
            error = np.hypot(own.log_evidence_stderr, found.log_evidence_stderr)
            print("log Z:", own.log_evidence, found.log_evidence, error)
            assert (np.abs(own.log_evidence - found.log_evidence) < 4 * error).all()
            assert found.stats["sampler_draws"] == 128 * len(PROMPTS)
            assert found.stats["sampler_difference"][1] < 1e-4
            assert found.stats["sampler_ess"] > 0.999
            hot = smollm2(PROMPTS, 8, temperature=1.7)
            x = hot.sample((4,))
            torch.testing.assert_close(hot.proposal_token_log_prob(x), hot.token_log_prob(x), atol=1e-3, rtol=0)
            proposed = replace(engine, guide=lm).run(program, PROMPTS)
            print("an adapter's:", proposed.stats["sampler_difference"], proposed.log_evidence)
            assert proposed.stats["sampler_difference"][1] < 1e-4
            error = np.hypot(own.log_evidence_stderr, proposed.log_evidence_stderr)
            assert (np.abs(own.log_evidence - proposed.log_evidence) < 4 * error).all()
            trained = SVI(num_steps=4, objective=ReverseKL(4), num_samples=32, seed=0, progress=False).run(
                program, PROMPTS
            )
            print("trained:", trained.stats["sampler_difference"], trained.stats["elbo"].sum(-1))
            assert trained.stats["sampler_difference"][1] < 1e-4
        finally:
            smollm2.sampler = lm.sampler = None


IN_PROCESS = """
import json, sys
from vllm import LLM
from bayeslm.models import LanguageModel
from bayeslm.models.lm import loading
from bayeslm.models.samplers import VLLM

if __name__ == "__main__":
    engine = LLM(loading.location("smollm2"), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
                 enable_lora=True, max_lora_rank=8, logprobs_mode="processed_logprobs")
    lm = LanguageModel.from_pretrained("smollm2", sampler=VLLM(engine))
    adapted = LanguageModel.from_pretrained(sys.argv[1], base=lm)
    found = {}
    for name, model in {"prior": lm, "policy": adapted}.items():
        dist = model(["My dinner at the restaurant was", "Yes"], 6, temperature=1.3)
        x = dist.sample((8,))
        found[name] = float((dist.proposal_token_log_prob(x) - dist.token_log_prob(x)).abs().max())
    print("FOUND", json.dumps(found))
"""


def test_draws_in_process(policy, tmp_path):
    """In vLLM's environment, into which bayeslm is put beside it (make test-vllm does)."""
    _, folder = policy
    script = tmp_path / "draw.py"
    script.write_text(IN_PROCESS)
    command = [os.environ["VLLM_PYTHON"], str(script), str(folder / "adapter")]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))
    print(found)
    assert max(found.values()) < 1e-3
