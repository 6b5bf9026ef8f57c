"""The explicit n-gram table: the meaning of its entries."""

import pytest
import torch
from support.models import WORDS, table_lm
from support.statistics import assert_random_state_kept

from bayeslm.models import LanguageModel


def contexts(order, vocab):
    """Every context of ``order`` - 1 tokens, None being nothing there, in the order of the table's rows."""
    tokens = [*range(vocab), None]
    rows = [()]
    for _ in range(order - 1):
        rows = [(*row, token) for row in rows for token in tokens]
    return rows


@pytest.mark.parametrize("order", [1, 2, 3])
def test_rows_are_contexts(order):
    """p(x_t | prompt, x_<t) is the softmax of the row of the n - 1 tokens before, also across padding."""
    vocab = 4
    lm = table_lm(order, seed=order, vocab=vocab)
    rows = {context: i for i, context in enumerate(contexts(order, vocab))}
    assert lm.network.table.shape == (len(rows), vocab)
    prompts = [[1], [2, 3, 1, 2]]
    dist = lm(prompts, max_new_tokens=3)
    x = dist.sample((10,))
    scores = dist.token_log_prob(x)
    for particle in range(10):
        for prompt in range(2):
            text = list(prompts[prompt])
            for t in range(int(dist.lengths(x)[particle, prompt])):
                before = ((None,) * order + tuple(text))[len(text) + 1 :]
                token = int(x[particle, prompt, t])
                expected = lm.network.table[rows[before]].log_softmax(-1)[token]
                torch.testing.assert_close(scores[particle, prompt, t], expected)
                text.append(token)


def test_the_table_can_be_given():
    table = torch.randn(4, 3)
    lm = LanguageModel.tabular(["<eos>", "a", "b"], order=2, table=table)
    table.zero_()  # a copy is kept
    assert lm.network.table.abs().min() > 0
    with pytest.raises(ValueError, match=r"table must have shape \(4, 3\), got \(3, 3\)"):
        LanguageModel.tabular(["<eos>", "a", "b"], order=2, table=torch.zeros(3, 3))


def test_seeds():
    with assert_random_state_kept():
        first, again, other = (table_lm(seed=seed).network.table for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.std().item() - 1) < 0.2  # 648 normal draws: 7 standard errors


def test_vocabularies():
    with pytest.raises(ValueError, match="no '<eos>'"):
        LanguageModel.tabular(["a", "b"])
    with pytest.raises(ValueError, match="a token twice"):
        LanguageModel.tabular(["<eos>", "a", "a"])
    with pytest.raises(ValueError, match="vocabulary holds 'a b': a word is not empty, and has no space in it"):
        LanguageModel.tabular(["<eos>", "a b"])
    lm = LanguageModel.tabular(["x", "STOP"], eos="STOP")
    assert (lm.eos_token_ids, lm.bos_token_id, lm.pad_token_id) == ((1,), 1, 1)


def test_half_precision_keeps_its_tokens():
    """bfloat16 has 8 bits, and a vocabulary more tokens than that: the cache must not round them."""
    lm = LanguageModel.tabular([WORDS[0], *(f"w{i}" for i in range(400))], order=2)
    lm.network.bfloat16()
    dist = lm([[399]], max_new_tokens=2)
    expected = lm.network.table.float().log_softmax(-1)
    value = torch.tensor([[397, 5]])
    torch.testing.assert_close(dist.token_log_prob(value), torch.stack([expected[399, 397], expected[397, 5]])[None])
