"""Stop strings, truncated priors and completions that are not written, as distributions: all by enumeration."""

import pytest
import torch
from support.models import WORDS, llama_network, table_lm, tiny_llama
from support.statistics import assert_drawn_from, count_completions
from support.tokenizers import byte_level

from bayeslm.models import LanguageModel
from bayeslm.models.lm import redraw

PROMPTS = [[1, 2], [3]]
SMALL = {
    "table": lambda: table_lm(order=3, seed=1, vocab=4),
    "pad is a word": lambda: _table(eos_token_ids=(0,), pad_token_id=1),
    "no pad token": lambda: _table(eos_token_ids=(0,), pad_token_id=9),
    "two ends": lambda: _table(eos_token_ids=(0, 3)),
}
SETTINGS = {
    "stop": {"stop": "b"},
    "stops": {"stop": ["ca", "bb"]},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7, "temperature": 1.3},
    "both": {"top_k": 3, "top_p": 0.8, "stop": "aa"},
    "where": {"where": torch.tensor([True, False])},
    "all": {"where": torch.tensor([[True, False], [False, True]]), "top_k": 3, "stop": "b"},
}


def _table(**settings):
    lm = table_lm(order=3, seed=1, vocab=4)
    return LanguageModel(lm.network, lm.tokenizer, **settings)


def by_hand(lm, prompt, value, *, top_k=None, top_p=None, stop=(), temperature=1.0, where=None):
    """log p of one completion, by the definition: token by token, the text compared with the strings."""
    ends, pad, stop = lm.eos_token_ids, lm.pad_token_id, [stop] if isinstance(stop, str) else list(stop)
    if stop and pad not in ends and 0 <= pad < lm.vocab_size:
        pad = ends[0]
    if where is False:
        return 0.0 if value == [ends[0]] + [pad] * (len(value) - 1) else -torch.inf
    total, text, done = 0.0, "", False
    for t, token in enumerate(value):
        if done:
            if token != pad:
                return -torch.inf
            continue
        if not 0 <= token < lm.vocab_size:
            return -torch.inf
        logits = lm.network(torch.tensor([[*prompt, *value[:t]]])).logits[0, -1] / temperature
        p = logits.double().softmax(-1)
        if top_k is not None:
            p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0.0)
            p = p / p.sum()
        if top_p is not None:
            kept, mass = [], 0.0
            for v in p.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                kept.append(v)
                mass += float(p[v])
            p = torch.where(torch.isin(torch.arange(len(p)), torch.tensor(kept)), p, 0.0)
            p = p / p.sum()
        total += float(p[token].log())
        text += WORDS[token] if token else ""
        done = token in ends or any(s in text for s in stop)
    return total


def support_of(dist, lm, length):
    """All values of ids that could be completions, (value, token)."""
    ids = sorted({*range(lm.vocab_size), lm.pad_token_id, dist.vocabulary.pad_token_id})
    return torch.cartesian_prod(*[torch.tensor(ids)] * length)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", SMALL)
def test_the_distribution_is_normalised_and_that_of_the_definition(make, settings):
    """Every sequence of ids: what the support lists sums to 1, and all else has probability 0."""
    lm, settings = SMALL[make](), SETTINGS[settings]
    dist = lm(PROMPTS, max_new_tokens=3, **settings)
    support = dist.enumerate_support()
    assert len(support) == dist.support_size == len({tuple(row) for row in support.reshape(len(support), -1).tolist()})
    torch.testing.assert_close(dist.log_prob(support).exp().sum(0), torch.ones(dist.batch_shape))
    values = support_of(dist, lm, 3)
    found = dist.log_prob(values.reshape(-1, *(1,) * len(dist.batch_shape), 3)).exp()
    torch.testing.assert_close(found.sum(0), torch.ones(dist.batch_shape))
    where = settings.get("where")
    rest = {k: v for k, v in settings.items() if k != "where"}
    for i, prompt in enumerate(PROMPTS):
        one = (0, i) if len(dist.batch_shape) == 2 else (i,)
        taken = None if where is None else bool(where[one])
        expected = torch.tensor([by_hand(lm, prompt, row, where=taken, **rest) for row in values[::3].tolist()])
        torch.testing.assert_close(found[(slice(None, None, 3), *one)], expected.exp().float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_have_these_frequencies_and_scores(settings):
    lm = SMALL["pad is a word"]()
    dist = lm(PROMPTS, max_new_tokens=3, **SETTINGS[settings])
    support = dist.enumerate_support(expand=False).reshape(-1, 3)
    torch.manual_seed(0)
    x = dist.sample((4000,))
    kept = dist.token_log_prob(x)
    torch.testing.assert_close(dist.token_log_prob(x.clone()), kept, atol=1e-5, rtol=1e-5)
    flat, scores = x.reshape(4000, -1, 3), dist.log_prob(dist.enumerate_support()).reshape(len(support), -1)
    for i in range(flat.shape[1]):
        assert_drawn_from(count_completions(flat[:, i], support, 10), scores[:, i])


@pytest.mark.parametrize("settings", ["stops", "all"])
def test_suffixes_are_redrawn_from_the_same(settings):
    """A string may begin before the cut, and a completion that is not written stays."""
    lm = SMALL["table"]()
    dist = lm(PROMPTS, max_new_tokens=4, **SETTINGS[settings]).expand((2, 2))
    torch.manual_seed(0)
    x = dist.sample()
    x[0, 0] = lm.encode(["a c"], 4, eos=False)[0].clamp_min(0)  # open: its last two tokens are redrawn
    new, scores = redraw(dist, x, torch.full((2, 2), 2), copies=500)
    assert torch.equal(new[..., :2], x[..., :2].expand_as(new[..., :2]))
    torch.testing.assert_close(scores.sum(-1), dist.token_log_prob(new)[..., 2:].sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(dist.log_prob(new)).all()


@pytest.mark.parametrize("settings", ["top_k", "top_p", "both", "where"])
def test_gradients_are_those_of_the_definition(settings):
    """Of a policy: sum_x p(x) grad log p(x) f(x) is the gradient of the enumerated expectation."""
    lm = table_lm(order=2, seed=1, vocab=4).policy()
    dist = lm(PROMPTS, max_new_tokens=3, **SETTINGS[settings])
    support, (weights,) = dist.enumerate_support(), lm.network.parameters()
    f = torch.randn(len(support), 2, generator=torch.Generator().manual_seed(0))
    log_p = dist.log_prob(support)
    (by_score,) = torch.autograd.grad(
        (log_p.exp().detach() * f * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(), weights
    )
    log_p = dist.log_prob(support)
    (directly,) = torch.autograd.grad((log_p.exp() * f).sum(), weights)
    torch.testing.assert_close(by_score, directly)
    assert by_score.isfinite().all()
    assert by_score.abs().sum() > 0


def test_ties_at_the_limit_are_cut_by_id():
    lm = table_lm(order=1, vocab=4)
    lm.network.table.data[:] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    p = lm([[1]], 1, top_k=2).log_prob(torch.tensor([[[0]], [[1]], [[2]], [[3]]])).exp()[:, 0]
    torch.testing.assert_close(p, torch.tensor([0.0, 0.5, 0.5, 0.0]))
    p = lm([[1]], 1, top_p=0.4).log_prob(torch.tensor([[[0]], [[1]], [[2]], [[3]]])).exp()[:, 0]
    torch.testing.assert_close(p, torch.tensor([0.0, 0.5, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("tokens", "stop", "length"),
    [
        (["Ġgood", "Ġfood", "."], "od fo", 2),  # across tokens
        (["Ġgood", ".", "Ġfood"], [".", "food"], 2),  # the first of several
        (["f", "o", "o", "o", "d"], "ood", 5),  # begins again inside what was begun
        (["Ġfood", "Ġis"], "oo", 1),  # in the middle of a token
        (["Ġis", "Ġis", "Ġa"], "isis", 3),  # none
    ],
)
def test_a_string_is_found_wherever_it_stands_in_the_text(tokens, stop, length):
    lm = LanguageModel(llama_network(vocab_size=len(byte_level())), byte_level(), eos_token_ids=(0,))
    value = torch.tensor([lm.tokenizer.convert_tokens_to_ids(tokens)])
    dist = lm(["My"], len(tokens), stop=stop)
    assert dist.lengths(value).tolist() == [length]
    assert dist.truncated(value).tolist() == [length == len(tokens) and stop != "ood"]


def test_texts_cut_at_the_limit_are_told():
    dist = tiny_llama(eos_token_ids=(0, 3), pad_token_id=0)([[1]], 3, stop="b")
    rows = [[1, 1, 1], [1, 1, 0], [1, 3, 0], [1, 1, 2], [2, 0, 0], [1, -100, -100]]
    assert dist.truncated(torch.tensor(rows)).tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stop": ""}, ValueError, "empty string"),
        ({"stop": [3]}, TypeError, r"stop must be a string or several, got \[3\]"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"where": torch.ones(2)}, TypeError, "where must be a bool tensor"),
        ({"where": torch.ones(3, dtype=torch.bool)}, ValueError, r"where has shape \(3,\), and prompts \(2,\)"),
    ],
)
def test_settings_without_meaning_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        table_lm()(PROMPTS, 3, **settings)


def test_without_end_or_tokenizer_they_say_so():
    with pytest.raises(ValueError, match="where needs an end token"):
        tiny_llama(eos_token_ids=())(PROMPTS, 3, where=torch.tensor([True, False]))
    with pytest.raises(TypeError, match="stop needs a tokenizer"):
        LanguageModel(llama_network())(PROMPTS, 3, stop="a")


@pytest.mark.parametrize("settings", SETTINGS)
def test_known_scores_are_used_for_the_same_distribution_alone(settings):
    """Engines keep the scores of one run for the next: by all that a distribution depends on."""
    lm = SMALL["table"]()
    dist = lm(PROMPTS, max_new_tokens=3, **SETTINGS[settings])
    assert dist.is_same(lm(PROMPTS, max_new_tokens=3, **SETTINGS[settings]))
    assert not dist.is_same(lm(PROMPTS, max_new_tokens=3))
    assert not lm(PROMPTS, max_new_tokens=3).is_same(dist)
    if "where" in SETTINGS[settings]:
        assert not dist.is_same(lm(PROMPTS, 3, **SETTINGS[settings] | {"where": ~SETTINGS[settings]["where"]}))
