"""Where tokens end in the text of a completion, and by how much a policy has moved each of them."""

import numpy as np
import pytest
import torch
from support.models import llama_network
from support.tokenizers import TOKENIZERS, byte_level

from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.posterior import Posterior


def model(tokenizer, seed=0):
    return LanguageModel(llama_network(seed, vocab_size=len(tokenizer)), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_beginnings_end_where_their_last_token_does(name):
    """The text of the first t tokens is the text's beginning up to the end of token t, unless a character is cut."""
    tokenizer = TOKENIZERS[name]()
    lm = model(tokenizer)
    words = [i for word, i in tokenizer.get_vocab().items() if word.strip("Ġ▁#</w>").isalpha() and word.isprintable()]
    words = torch.tensor([i for i in words if tokenizer.decode([i]).isascii()])
    value = words[torch.randint(len(words), (40, 6))]
    texts = lm.decode(value)
    ends = lm.token_ends(value, texts)
    assert ends.shape == value.shape
    assert (np.diff(ends) >= 0).all()
    assert (ends[:, -1] == np.vectorize(len)(texts)).all()
    for row, text, end in zip(value, texts, ends, strict=True):
        for t in range(1, 6):
            beginning = lm.decode(row[None, :t])[0]
            assert text.startswith(text[: end[t - 1]])
            assert text[: end[t - 1]].rstrip() == beginning.rstrip()


def test_a_character_of_several_tokens_ends_with_its_last():
    tokenizer = byte_level()
    lm = model(tokenizer)
    value = torch.tensor([tokenizer(" good 中文!")["input_ids"]])
    texts = lm.decode(value)
    (ends,) = lm.token_ends(value, texts)
    pieces = [texts[0][a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert [piece for piece in pieces if piece][-4:] == [" ", "中", "文", "!"]


@pytest.mark.parametrize("size", [None, 1])
def test_tokens_of_a_policy_add_up_to_its_weights(size, tmp_path):
    """Σ (log q − log p) = log-likelihood − log-weight, also of prompts in chunks, after resampling and from a file."""
    tokenizer = byte_level()
    prior, policy = model(tokenizer), model(tokenizer, seed=1)
    program = TiltedLM(prior, rewards.Length(target=4), beta=2.0, max_new_tokens=5, subsample_size=size)
    drawn = ImportanceSampling(num_particles=40, guide=policy, seed=0).run(program, ["My food", "is good"])
    drawn.save(tmp_path / "run")
    for posterior in (drawn, Posterior.load(tmp_path / "run")):
        ratio, ends = posterior.token_log_ratio["completion"], posterior.token_ends["completion"]
        expected = posterior.log_likelihood["reward"] - posterior.log_weights
        np.testing.assert_allclose(ratio.sum(-1), expected, atol=1e-4)
        lengths = posterior.lengths["completion"]
        assert (ratio[np.arange(ratio.shape[-1]) >= lengths[..., None]] == 0).all()
        assert (ends[..., -1] == np.vectorize(len)(posterior.texts["completion"])).all()
    resampled = drawn.resample()
    for draw in range(40):
        ids = resampled.samples["completion"][0, draw, 1]
        (source, *_) = np.flatnonzero((drawn.samples["completion"][0, :, 1] == ids).all(-1))
        for field in ("token_log_ratio", "token_ends"):
            before, after = (getattr(each, field)["completion"] for each in (drawn, resampled))
            np.testing.assert_allclose(after[0, draw, 1], before[0, source, 1], atol=1e-5)


def test_draws_of_the_prior_have_no_policy():
    program = TiltedLM(model(byte_level()), rewards.Length(target=4), beta=2.0, max_new_tokens=3)
    posterior = ImportanceSampling(num_particles=8, seed=0).run(program, ["My food"])
    assert not posterior.token_log_ratio
    trained = SVI(num_steps=1, num_particles=2, num_samples=8, seed=0, progress=False).run(program, ["My food"])
    assert trained.token_log_ratio["completion"].shape == (1, 8, 1, 3)
