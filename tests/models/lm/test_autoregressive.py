"""The distribution of completions against exact answers: normalisation, draws, and independence of batching."""

from types import SimpleNamespace

import pyro
import pytest
import torch
from support.models import table_lm, tiny_llama
from support.oracles import all_by_hand
from support.statistics import assert_drawn_from, count_completions

from bayeslm.models import Autoregressive, LanguageModel
from bayeslm.models.lm.decoding import categorical
from bayeslm.models.lm.encoding import Vocabulary
from bayeslm.models.lm.network import CausalNetwork
from bayeslm.models.lm.usage import count_usage

PROMPTS = ["a b c d e", "f", "g a b"]  # of different lengths, so that two are padded
IDS = [[1, 2, 3, 4, 5], [6], [7, 1, 2]]

MODELS = {
    "table of order 1": lambda: table_lm(order=1, seed=1),
    "table of order 2": lambda: table_lm(order=2, seed=2),
    "table of order 4": lambda: table_lm(order=4, seed=3),
    "llama": lambda: tiny_llama(seed=4),
    "no end": lambda: tiny_llama(seed=5, eos_token_ids=()),
    "several ends": lambda: tiny_llama(seed=6, eos_token_ids=(0, 3, 5)),
    "pad is a word": lambda: tiny_llama(seed=7, pad_token_id=6),
    "pad is another end": lambda: tiny_llama(seed=8, eos_token_ids=(0, 3), pad_token_id=3),
    "pad is no token": lambda: tiny_llama(seed=9, pad_token_id=-1),
}


@pytest.fixture(params=MODELS, scope="module")
def lm(request) -> LanguageModel:
    return MODELS[request.param]()


# -- normalisation and the support ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_probabilities_sum_to_one(lm, temperature):
    dist = lm(PROMPTS, max_new_tokens=3, temperature=temperature)
    values = dist.enumerate_support(expand=False)
    assert values.shape == (dist.support_size, 1, 3)
    assert len(torch.unique(values.squeeze(1), dim=0)) == dist.support_size
    assert dist.support.check(values).all()
    log_prob = dist.log_prob(values)
    assert log_prob.shape == (dist.support_size, 3)
    torch.testing.assert_close(log_prob.double().logsumexp(0), torch.zeros(3).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_support_size(tokens):
    dist = tiny_llama(eos_token_ids=(0, 3))(PROMPTS, max_new_tokens=tokens)
    assert dist.support_size == {1: 8, 2: 2 + 6 * 8, 4: 2 + 6 * (2 + 6 * (2 + 6 * 8))}[tokens]
    assert dist.enumerate_support().shape == (dist.support_size, 3, tokens)


def test_a_support_too_large_is_refused():
    with pytest.raises(ValueError, match=r"completions are too many to enumerate .*smaller vocabulary"):
        table_lm()(["a"], max_new_tokens=12).enumerate_support()


def test_temperature_divides_the_logits():
    lm = tiny_llama()
    x = lm(PROMPTS, 5).sample((2,))
    for temperature in (0.5, 2.0):
        actual = lm(PROMPTS, 5, temperature=temperature).token_log_prob(x)
        torch.testing.assert_close(actual, all_by_hand(lm, IDS, x, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ([1, 0, 2, 6], 2),  # a word after the end
        ([0, 0, 6, 6], 1),  # the end twice
        ([1, 2, 3, 8], 3),  # not in the vocabulary
        ([1, -1, 2, 3], 1),
        ([10**9, 1, 2, 3], 0),
        ([0, 6, 6, -1], 3),  # not the pad id
    ],
)
def test_malformed_completions_have_no_probability(value, wrong):
    dist = tiny_llama(pad_token_id=6)(PROMPTS, max_new_tokens=4)
    fine = torch.tensor([1, 2, 0, 6])
    both = torch.stack([torch.tensor(value).expand(3, -1), fine.expand(3, -1)])
    assert dist.support.check(both).tolist() == [[False] * 3, [True] * 3]
    tokens = dist.token_log_prob(both)
    assert tokens[0, :, wrong].eq(-torch.inf).all()
    assert dist.log_prob(both)[0].eq(-torch.inf).all()
    assert tokens[1, :, 3].eq(0).all()
    torch.testing.assert_close(dist.log_prob(both)[1], dist.log_prob(fine))


def test_a_malformed_completion_leaves_the_gradient_finite():
    policy = tiny_llama().policy()
    value = torch.tensor([[1, 0, 2], [1, 2, 9], [3, 4, 5]])
    scores = policy(PROMPTS, 3).log_prob(value)
    assert torch.isinf(scores).tolist() == [True, True, False]
    scores[2].backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_completions_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"expected completions of 4 tokens, got shape \(3, 5\)"):
        tiny_llama()(PROMPTS, max_new_tokens=4).log_prob(torch.ones(3, 5, dtype=torch.long))


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("inf")}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        table_lm()(PROMPTS, **settings)


def test_arbitrary_completions_are_well_formed():
    for make in MODELS.values():
        dist = make()(PROMPTS, 4).expand([50, 3])
        assert dist.arbitrary().shape == (50, 3, 4)
        assert dist.support.check(dist.arbitrary()).all()


def test_lengths_count_the_end():
    dist = tiny_llama(eos_token_ids=(0, 3), pad_token_id=6)(["a"], max_new_tokens=3)
    values = torch.tensor([[0, 6, 6], [1, 3, 6], [1, 2, 0], [1, 6, 2]])
    assert dist.lengths(values).tolist() == [1, 2, 3, 3]


# -- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sample_shape", "expand", "both"])
def test_draws_follow_the_distribution(lm, way):
    pyro.set_rng_seed(11)
    num, temperature = 3000, 0.8
    dist = lm(PROMPTS, max_new_tokens=2, temperature=temperature)
    values = {
        "sample_shape": lambda: dist.sample((num,)),
        "expand": lambda: dist.expand([num, 3]).sample(),
        "both": lambda: dist.expand([num // 100, 3]).sample((100,)).reshape(num, 3, 2),
    }[way]()
    assert values.shape == (num, 3, 2)
    assert dist.support.check(values).all()
    support = dist.enumerate_support(expand=False)
    log_prob = dist.log_prob(support)
    for prompt in range(3):
        counts = count_completions(values[:, prompt], support.squeeze(1), 8)
        assert_drawn_from(counts, log_prob[:, prompt])


def test_sampling_in_micro_batches_follows_the_distribution():
    lm = tiny_llama(seed=1, batch_size=2)
    dist = lm(PROMPTS, max_new_tokens=1)
    values = dist.sample((500,))
    for prompt in range(3):
        expected = lm.network(input_ids=torch.tensor([IDS[prompt]])).logits[0, -1].log_softmax(-1)
        assert_drawn_from(torch.bincount(values[:, prompt, 0], minlength=8), expected)


def test_sampling_nothing():
    assert tiny_llama()(PROMPTS, 3).sample((0,)).shape == (0, 3, 3)


@pytest.mark.parametrize("vocab", [1, 3, 256, 257, 1000])
def test_categorical_inverts_the_cdf(vocab):
    """Of a vocabulary that is not a multiple of the block, with tokens of no mass and of almost no mass."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 2 * torch.randn(vocab, generator=generator)
    logits[1::5] = -torch.inf
    logits[2::7] -= 60.0
    log_prob = logits.double().log_softmax(-1)
    counts = torch.zeros(vocab, dtype=torch.long)
    for _ in range(4):
        tokens, scores = categorical(logits.expand(10_000, -1))
        counts += torch.bincount(tokens, minlength=vocab)
        torch.testing.assert_close(scores.double(), log_prob[tokens], atol=1e-5, rtol=0)
    assert_drawn_from(counts, log_prob)


def test_categorical_of_rows_that_differ():
    """Each row follows its own logits, also where a block of the vocabulary has all of the mass."""
    logits = torch.full((600, 600), -torch.inf)
    logits[torch.arange(600), torch.arange(600)] = torch.linspace(-1e4, 1e4, 600)
    tokens, scores = categorical(logits)
    assert tokens.tolist() == list(range(600))
    assert scores.eq(0).all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_categorical_of_extreme_logits(scale):
    logits = torch.tensor([-1.0, 0.5, 1.0, 1.0, -torch.inf]) * scale
    tokens, scores = categorical(logits.expand(2000, -1))
    assert set(tokens.tolist()) == {2, 3}
    torch.testing.assert_close(scores, torch.full((2000,), -2.0).exp2().log() / 2)


@pytest.mark.parametrize("vocab", [5, 256, 700])
@pytest.mark.parametrize(("uniform", "index"), [(0.0, 0), (1.0 - 2.0**-53, -1)])
def test_categorical_at_the_ends_of_the_unit_interval(monkeypatch, vocab, uniform, index):
    """The smallest and largest uniforms give the first and last token that have mass, never one without."""
    monkeypatch.setattr(torch, "rand", lambda size, **kw: torch.full(size, uniform, **kw))
    logits = torch.randn(50, vocab, generator=torch.Generator().manual_seed(0))
    first, last = (300, 600) if vocab > 600 else (2, vocab - 2)  # with a block of no mass before them and none
    logits[:, :first] = logits[:, last + 1 :] = -torch.inf
    tokens, _ = categorical(logits)
    assert (tokens == [first, last][index]).all()


@pytest.mark.parametrize("ulps", [-1, 0, 1])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_categorical_at_the_edge_of_a_block(monkeypatch, block, ulps):
    """Where rounding decides between two blocks of the vocabulary, the token drawn still has mass."""
    logits = 3 * torch.randn(3000, 1024, generator=torch.Generator().manual_seed(1))
    logits.unflatten(-1, (4, 256))[:, :, [0, 1, -2, -1]] = -torch.inf
    mass = (logits - logits.amax(-1, keepdim=True)).exp().unflatten(-1, (4, 256))
    cdf = mass.sum(-1, dtype=torch.float64).cumsum(-1)
    edge = cdf[:, block, None] / cdf[:, -1:]
    edge = torch.nextafter(edge, edge + ulps)
    monkeypatch.setattr(torch, "rand", lambda size, **kw: edge)
    tokens, scores = categorical(logits)
    assert torch.isfinite(scores).all()
    assert (tokens // 256 - block).clamp(0, 1).equal(tokens // 256 - block)


# -- batching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, pytest.param(2, marks=pytest.mark.long), 5])
def test_scores_do_not_depend_on_the_batch(lm, batch_size):
    """Nor on other prompts, padding or micro-batches; and the scores of sampling are the network's own."""
    dist = lm(PROMPTS, max_new_tokens=6)
    x = dist.sample((4,))
    expected = all_by_hand(lm, IDS, x)
    torch.testing.assert_close(dist.token_log_prob(x), expected, atol=1e-5, rtol=0)
    special = {"eos_token_ids": lm.eos_token_ids, "pad_token_id": lm.pad_token_id}
    parted = LanguageModel(lm.network, lm.tokenizer, **special, batch_size=batch_size)
    torch.testing.assert_close(parted(PROMPTS, 6).token_log_prob(x), expected, atol=1e-5, rtol=0)
    dist = parted(PROMPTS, 6)
    y = dist.sample((4,))
    torch.testing.assert_close(dist.log_prob(y), lm(PROMPTS, 6).log_prob(y), atol=1e-5, rtol=0)
    for i in range(3):
        torch.testing.assert_close(lm(IDS[i : i + 1], 6).token_log_prob(x[:, i]), expected[:, i], atol=1e-5, rtol=0)


def test_shapes_broadcast():
    lm = table_lm()
    dist = lm(PROMPTS, max_new_tokens=3)
    x = dist.sample()
    assert dist.log_prob(x[0]).shape == (3,)
    assert dist.log_prob(x[:1].expand(2, 1, 3)).shape == (2, 3)
    assert dist.log_prob(x[:, None]).shape == (3, 3)
    wide = dist.expand([7, 3])
    assert wide.batch_shape == (7, 3)
    assert wide.event_shape == (3,)
    torch.testing.assert_close(wide.log_prob(x), dist.log_prob(x).expand(7, 3))
    policy = lm.policy()(PROMPTS, max_new_tokens=3)  # also with a gradient, which runs the network again
    x = policy.sample()
    torch.testing.assert_close(policy.expand([7, 3]).log_prob(x), policy.log_prob(x).expand(7, 3))
    values = wide.sample((2,))
    assert values.shape == (2, 7, 3, 3)
    torch.testing.assert_close(wide.log_prob(values), lm(PROMPTS, 3).log_prob(values))


def test_a_kept_score_is_dropped_when_the_value_changes():
    lm = tiny_llama()
    dist = lm(PROMPTS, max_new_tokens=3)
    x = dist.sample()
    x[:] = torch.tensor([1, 2, 3])
    torch.testing.assert_close(dist.log_prob(x), lm(PROMPTS, 3).log_prob(x))


@torch.no_grad()
def test_a_kept_score_is_dropped_when_the_weights_change():
    policy = tiny_llama().policy()
    dist = policy(PROMPTS, max_new_tokens=3)
    x = dist.sample()
    before = dist.log_prob(x)
    for p in policy.parameters():
        p.mul_(1.5)
    after = dist.log_prob(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, policy(PROMPTS, 3).log_prob(x))


def test_only_the_last_sample_has_a_kept_score():
    dist = tiny_llama()(PROMPTS, max_new_tokens=3)
    first, second = dist.sample(), dist.sample()
    with count_usage() as usage:
        dist.log_prob(second)
    assert usage.model_calls == 0
    for value in (first, first, second.clone()):
        with count_usage() as usage:
            dist.log_prob(value)
        assert usage.model_calls > 0


def test_any_network_with_a_vocabulary_will_do():
    """No tokenizer, and no `LanguageModel`."""
    lm = tiny_llama(eos_token_ids=(0, 3))
    causal = CausalNetwork(lm.network)
    model = SimpleNamespace(
        causal=causal,
        current=lambda: causal,
        vocabulary=Vocabulary(8, (0, 3), pad_token_id=0),
        batch_size=None,
        micro_batch_size=None,
        gradient_checkpointing=False,
        has_text=False,
    )
    dist = Autoregressive(model, torch.tensor([[1, 2], [4, 5]]), None, max_new_tokens=4)
    x = dist.sample((5,))
    torch.testing.assert_close(dist.log_prob(x), lm([[1, 2], [4, 5]], 4).log_prob(x))
    assert dist.prompt_texts() == ["1 2", "4 5"]
    assert not dist.has_text


def test_the_same_prompts_under_another_model():
    prior, other = table_lm(seed=1), table_lm(seed=2)
    dist = prior(PROMPTS, 3, temperature=0.7).expand([5, 3])
    x = dist.sample()
    swapped = dist.with_model(other)
    assert swapped.batch_shape == (5, 3)
    torch.testing.assert_close(swapped.log_prob(x), other(PROMPTS, 3, temperature=0.7).log_prob(x))
