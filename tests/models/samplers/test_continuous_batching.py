"""Draws by transformers' generate_batch, on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS
from support.statistics import assert_drawn_from, count_completions

from bayeslm.models import LanguageModel
from bayeslm.models.lm.adapters import own_parameters
from bayeslm.models.samplers import ContinuousBatching, SamplerError


def test_draws_come_from_the_network_with_its_adapters_at_a_temperature():
    lm = tiny_llama(1, sampler=ContinuousBatching(rows=128))
    policy = lm.policy(lora_rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in own_parameters(policy.network):
            p.add_(0.3 * torch.randn_like(p))
    version = policy.causal.version
    dist = policy(PROMPTS, 3, temperature=1.3)
    x = dist.sample((300,))
    torch.testing.assert_close(dist.proposal_token_log_prob(x), dist.token_log_prob(x), atol=1e-4, rtol=0)
    support = dist.enumerate_support()
    for prompt in range(2):
        drawn = count_completions(x[:, prompt], support[:, prompt], 8)
        assert_drawn_from(drawn, dist.log_prob(support)[:, prompt])
    assert policy.causal.version == version
    assert policy.causal.is_current


def test_the_random_state_is_its_own():
    dist = tiny_llama(1, sampler=ContinuousBatching())(PROMPTS, 3)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(dist.sample((4,)))
        after = torch.rand(1)
        torch.manual_seed(3)
        torch.randint(2**62, ())  # the seed of the request
        assert torch.equal(after, torch.rand(1))
    assert torch.equal(*found)


def test_what_it_cannot_draw():
    with pytest.raises(SamplerError, match=r"NGramForCausalLM is no network of transformers|failed"):
        LanguageModel(table_lm(2, vocab=4).network, sampler=ContinuousBatching())([[1]], 3).sample()
    slow = tiny_llama(1, sampler=ContinuousBatching(rows=1, time_limit=0.01))
    with pytest.raises(SamplerError, match=r"has \d of 60 completions after 0\.01 s: raise time_limit"):
        slow([[1, 2]], 30).sample((60,))
