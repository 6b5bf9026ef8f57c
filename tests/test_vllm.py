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
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeslm.models import LanguageModel
from bayeslm.models.lm import loading
from bayeslm.models.lm.adapters import own_parameters

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
