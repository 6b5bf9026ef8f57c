"""Draws by vLLM's interface: a server on the loopback with a small network behind it, and its faults."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial

import pytest
import torch
from support.judge_server import cut, drip, drop, raw, slow
from support.models import llama_network, tiny_llama
from support.programs import PROMPTS, score_table, tilted
from support.statistics import assert_drawn_from, assert_evidence, count_completions
from support.vllm_server import FakeVLLM, serving_vllm

from bayeslm.inference import SVI, Exact, ImportanceSampling
from bayeslm.inference.training import Adam, AutoPolicy, ReverseKL
from bayeslm.models import LanguageModel
from bayeslm.models.lm.adapters import own_parameters
from bayeslm.models.samplers import SamplerError, VLLMServer


def lm_of(address: str, **settings) -> LanguageModel:
    return tiny_llama(1, sampler=VLLMServer(address, **({"time_limit": 20.0} | settings)))


@pytest.fixture
def server():
    return FakeVLLM(llama_network(1))


def test_draws_come_from_the_network_and_log_z_is_right(server):
    """The server's logits are 20% larger: draws are of that, and weights are right."""
    server.scale = 1.2
    with serving_vllm(server) as address:
        lm = lm_of(address)
        dist = lm([[2, 3, 4]], 3)
        x = dist.sample((200,))[:, 0]
        support = dist.enumerate_support()[:, 0]
        tempered = tiny_llama(1)([[2, 3, 4]], 3, temperature=1 / 1.2).log_prob(support[:, None])[:, 0]
        assert_drawn_from(count_completions(x, support, 8), tempered)
        model = tilted(lm, score_table(1, tokens=3))
        exact = Exact(progress=False).run(model, PROMPTS)
        engine = ImportanceSampling(num_particles=8, num_chains=16, seed=0, progress=False)
        found, again = (engine.run(model, PROMPTS) for _ in range(2))
        assert_evidence(found, exact.log_evidence, unbiased=True)
        assert found.stats["sampler_draws"] == 256
        assert 0.05 < found.stats["sampler_difference"][1] < 0.3
    assert (again.samples["completion"] == found.samples["completion"]).all()


def test_a_policy_reaches_the_server_as_an_adapter_with_a_version(server):
    """It is loaded anew whenever its weights have changed, and then alone."""
    with serving_vllm(server) as address:
        lm = lm_of(address)
        policy = lm.policy(lora_rank=2)
        torch.manual_seed(0)
        for _ in range(2):
            with torch.no_grad():
                for p in own_parameters(policy.network):
                    p.add_(0.3 * torch.randn_like(p))
            dist = policy(PROMPTS, 3)
            for _ in range(2):
                x = dist.sample((5,))
                torch.testing.assert_close(dist.proposal_token_log_prob(x), dist.token_log_prob(x), atol=1e-4, rtol=0)
        loads = [body["lora_name"] for path, body in server.requests if path == "load_lora_adapter"]
        assert len(set(loads)) == len(loads) == 2
        assert set(server.networks) == {"tiny", loads[1]}
        assert {body["model"] for path, body in server.requests if path == "completions"} == set(loads)


def test_an_adapter_whose_draws_fail_at_once_or_never_begin_is_unloaded(server, monkeypatch):
    """After what is prepared has failed before its first request, and after nobody has it any more."""
    monkeypatch.setenv("KEY_OF_THE_SERVER", "some")

    class Preparing:
        def draw(self, request):
            self.draws = engine.prepare(request)
            raise SamplerError("it is to be drawn later")

    with serving_vllm(server) as address:
        engine, sampler = VLLMServer(address, key_variable="KEY_OF_THE_SERVER"), Preparing()
        policy = tiny_llama(1, sampler=sampler).policy(lora_rank=2)

        def prepare():
            with torch.no_grad():
                for p in own_parameters(policy.network):
                    p.add_(0.3)
            with pytest.raises(SamplerError, match="later"):
                policy(PROMPTS, 3).sample((5,))
            return len(server.networks) - 1  # without the prior's

        assert prepare() == 1
        assert prepare() == 2  # the first one's draws could still begin
        with monkeypatch.context() as gone:
            gone.delenv("KEY_OF_THE_SERVER")
            with pytest.raises(SamplerError, match="needs a key"):
                sampler.draws()
        assert prepare() == 1
        sampler.draws = None
        assert prepare() == 1


@pytest.mark.long
def test_a_policy_is_trained_by_a_servers_draws(server):
    with serving_vllm(server) as address:
        lm = lm_of(address)
        settings = {"objective": ReverseKL(4), "optimizer": Adam(0.01), "num_samples": 4, "seed": 0, "progress": False}
        model = tilted(lm, score_table(1, tokens=3))
        found = SVI(guide=partial(AutoPolicy, lora_rank=2), num_steps=3, **settings).run(model, PROMPTS)
        assert found.stats["sampler_difference"][1] < 1e-4
        assert sum(path == "load_lora_adapter" for path, _ in server.requests) >= 3
        with pytest.raises(SamplerError, match=r"all weights of this one were trained.*lora_rank=16"):
            SVI(num_steps=3, **settings).run(model, PROMPTS)


def test_at_another_temperature_log_probabilities_are_those_of_the_draws(server):
    with serving_vllm(server) as address:
        dist = lm_of(address)(PROMPTS, 3, temperature=2.0)
        x = dist.sample((5,))
        torch.testing.assert_close(dist.proposal_token_log_prob(x), dist.token_log_prob(x), atol=1e-4, rtol=0)
        server.processed = False
        assert lm_of(address)(PROMPTS, 3).sample((5,)).shape == (5, 2, 3)
        with pytest.raises(SamplerError, match="--logprobs-mode processed_logprobs"):
            lm_of(address)(PROMPTS, 3, temperature=2.0).sample()


def test_in_a_notebook_where_an_event_loop_runs(server):
    with serving_vllm(server) as address:

        async def cell():
            return lm_of(address)(PROMPTS, 3).sample((3,))

        assert asyncio.run(cell()).shape == (3, 2, 3)


def altered(change):
    """A fault: an answer of the right form, with something changed."""

    def send(handler):
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"tokens": ["token_id:1", "token_id:0"], "token_logprobs": [-1.0, -2.0]},
        }
        answer = {"id": "1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [choice]}
        change(answer)
        raw(200, json.dumps(answer).encode())(handler)

    return send


LOGPROBS = {
    "a token that is none": (lambda p: p.update(tokens=["token_id:99", "token_id:0"]), r"tokens outside 0\.\.7"),
    "a text in the place of tokens": (lambda p: p.update(tokens=["a", "b"]), "what is no completion"),
    "no log-probability": (lambda p: p.update(token_logprobs=[None, -2.0]), "returned the log-probability None"),
    "a positive one": (lambda p: p.update(token_logprobs=[0.5, -2.0]), r"returned the log-probability 0\.5"),
    "fewer than tokens": (lambda p: p.update(token_logprobs=[-2.0]), "2 tokens with 1 log-probabilities"),
    "no end": (lambda p: p.update(tokens=["token_id:1"] * 2), "without an end"),
    "too many tokens": (lambda p: p.update(tokens=["token_id:1"] * 9, token_logprobs=[-1.0] * 9), "of 9 tokens"),
}
FAULTS = {
    "a status": (raw(500, b"{}"), "vLLM at http.* failed: InternalServerError"),
    "an answer that is cut": (cut, "failed: APIConnectionError"),
    "a closed connection": (drop, "failed: APIConnectionError"),
    "no JSON": (raw(200, b"<html>"), "what is no completion"),
    "JSON of another shape": (raw(200, b'{"choices": 3}'), "what is no completion"),
    "silence": (slow(3.0, drop), r"has not answered after 0\.3 s: raise time_limit"),
    "a byte now and then": (drip, r"has not answered after 0\.3 s"),
    "too few": (altered(lambda a: a.update(choices=[])), "asked for 1 completions of 'tiny': it has 0"),
    "another model": (altered(lambda a: a.update(model="other")), "of 'other'"),
    **{
        name: (altered(lambda a, change=change: change(a["choices"][0]["logprobs"])), message)
        for name, (change, message) in LOGPROBS.items()
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_that_names_the_engine(name, server):
    fault, message = FAULTS[name]
    with serving_vllm(server) as address:
        limit = 0.3 if "0" in message and "answered" in message else 20.0
        lm = lm_of(address, max_retries=0)
        lm([[2]], 3).sample()  # the check
        lm.sampler.time_limit = limit
        server.faults["completions"] = fault
        start = time.monotonic()
        with pytest.raises(SamplerError, match=message):
            lm([[2]], 3).sample()
        assert time.monotonic() - start < 3.0


def test_what_fails_at_the_start(server):
    with pytest.raises(SamplerError, match=r"vLLM at http://127.0.0.1:9/v1 failed: APIConnectionError"):
        lm_of("http://127.0.0.1:9/v1", max_retries=0)([[2]], 3).sample()
    with serving_vllm(server) as address:
        server.version = "0.9.2"
        with pytest.raises(SamplerError, match=r"is version 0\.9: needed is vLLM 0\.10 or newer"):
            lm_of(address)([[2]], 3).sample()
        server.version = "0.32.0"
        server.faults["version"] = raw(404, b"{}")
        with pytest.raises(SamplerError, match="does not say its version"):
            lm_of(address)([[2]], 3).sample()
        del server.faults["version"]
        with pytest.raises(SamplerError, match=r"has no model 'other': it has \['tiny'\]"):
            lm_of(address, model="other")([[2]], 3).sample()
        with pytest.raises(SamplerError, match="needs a key in the environment variable NO_SUCH_KEY"):
            lm_of(address, key_variable="NO_SUCH_KEY")([[2]], 3).sample()
        server.faults["load_lora_adapter"] = raw(400, b'{"message": "rank 2 is too large"}')
        with pytest.raises(SamplerError, match=r"cannot load .* adapter: .*rank 2 is too large.*--enable-lora"):
            lm_of(address).policy(lora_rank=2)([[2]], 3).sample()
    with pytest.raises(ValueError, match="address must be one such as"):
        VLLMServer("localhost")
    with pytest.raises(ValueError, match="must not have a name or password"):
        VLLMServer("http://me:secret@localhost/v1")


def test_a_request_that_a_busy_server_refuses_is_repeated(server):
    with serving_vllm(server) as address:
        lm = lm_of(address)
        lm([[2]], 3).sample()
        refused = []

        def busy(handler):
            refused.append(1)
            del server.faults["completions"]
            raw(503, b"{}")(handler)

        server.faults["completions"] = busy
        assert lm([[2]], 3).sample((2,)).shape == (2, 1, 3)
        assert refused
