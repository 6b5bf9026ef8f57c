"""In a run a prompt is encoded once, and a text that grows is not decoded anew; both are as outside of a run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.models import llama_network
from support.tokenizers import TOKENIZERS, byte_level

from bayeslm.inference import MCMC, SMC, SVI, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import encoding, remembering, texts

PROMPTS = ["My food", "the food is not good, is it", "a"]
SETTINGS: dict[str, Any] = {"seed": 0, "progress": False}


def model(tokenizer: Any) -> LanguageModel:
    network = llama_network(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=512)
    return LanguageModel(network, tokenizer, eos_token_ids=())


class Decoded:
    """Counts what a tokenizer decodes in the block."""

    def __init__(self, tokenizer: Any) -> None:
        self.calls = self.tokens = 0
        self._own, self._patch = tokenizer.batch_decode, mock.patch.object(tokenizer, "batch_decode", self._count)

    def _count(self, rows: Any, **settings: Any) -> Any:
        self.calls, self.tokens = self.calls + 1, self.tokens + sum(map(len, rows))
        return self._own(rows, **settings)

    def __enter__(self) -> Decoded:
        self._patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()


# -- prompts -------------------------------------------------------------------------------------------------


ENGINES = {
    "importance": lambda num: ImportanceSampling(8 * num, batch_size=8, **SETTINGS),
    "smc": lambda num: SMC(8, num, twist="partial", **SETTINGS),
    "mcmc": lambda num: MCMC(num_samples=num, warmup=1, num_chains=2, **SETTINGS),
    "svi": lambda num: SVI(num_steps=num, num_particles=2, num_samples=2, **SETTINGS),
}
KINDS: dict[str, list[Any]] = {"texts": PROMPTS, "token ids": [[1, 2], [3], [4, 5, 6]]}


@pytest.mark.parametrize(("name", "kind"), [*((name, "texts") for name in ENGINES), ("smc", "token ids")])
def test_a_prompt_is_encoded_once_a_run(name, kind):
    program = TiltedLM(model(byte_level()), rewards.Length(), max_new_tokens=4)
    for num in (1, 3):
        with mock.patch.object(encoding, "_one", wraps=encoding._one) as one:
            ENGINES[name](num).run(program, KINDS[kind])
        assert one.call_count == len(PROMPTS), num


def test_what_a_prompt_is_encoded_with_is_part_of_it():
    lm = model(byte_level())
    other = model(byte_level(before=True))
    with remembering():
        for prompts in (["a"], [("a", "b")], [[1, 2]], [[True, 2]], ["a", "a"], [[1], [2]]):
            try:
                expected = encoding.Encoded(*lm.encode_prompts(list(prompts))).rows()
            except TypeError:
                expected = None
            if expected is not None:
                assert lm.encode_prompts(prompts).rows() == expected
        assert lm.encode_prompts(["a"]).rows() != other.encode_prompts(["a"]).rows()
        assert lm.encode_prompts(["a"]).ids is lm.encode_prompts(["a"]).ids
        assert lm.encode_prompts(["a", "a"]).ids.shape == (2, 1)
        with pytest.raises(ValueError, match="room for 1 before"):
            lm.encode_prompts(["a", "the food"], max_new_tokens=511)
        with pytest.raises(ValueError, match="token ids outside"):
            lm.encode_prompts([[1], [10**6]])
    assert lm.encode_prompts(["a"]).ids is not lm.encode_prompts(["a"]).ids  # outside of a run nothing is kept


# -- texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_that_grow_are_those_that_are_decoded_at_once(name):
    """All tokens, bytes of incomplete characters and special ones among them; rows replace one another meanwhile."""
    tokenizer = TOKENIZERS[name]()
    lm, generator = model(tokenizer), torch.Generator().manual_seed(0)
    some = torch.randint(len(tokenizer), (24,), generator=generator)  # few, so that some rows stay equal
    value = torch.full((6, 3, 50), -1)
    distribution = lm(PROMPTS, 50)
    with Decoded(tokenizer) as decoded, remembering():
        found = []
        for t in range(50):
            value[..., t] = some[torch.randint(len(some), (6, 3), generator=generator)]
            if t % 7 == 0:
                value = value[torch.randint(6, (6,), generator=generator)]
            found.append((value.clone(), distribution.decode(value)))
    for value, grown in found:
        assert grown.tolist() == distribution.decode(value).tolist()
    assert decoded.calls <= 6 * 50


def test_texts_so_far_are_not_decoded_anew():
    """Of a text that is twice as long twice as many tokens are decoded, in twice as many calls."""
    tokenizer = byte_level()
    program = TiltedLM(model(tokenizer), rewards.Length(), max_new_tokens=60)
    counts = []
    for tokens in (60, 120):
        program.max_new_tokens = tokens
        with Decoded(tokenizer) as decoded:
            SMC(4, 1, twist="partial", **SETTINGS).run(program, PROMPTS[:1])
        counts.append((decoded.calls, decoded.tokens))
    (calls, tokens), (more_calls, more_tokens) = counts
    assert more_calls <= 2.4 * calls
    assert more_tokens <= 2.4 * tokens
    assert more_tokens <= 120 * 4 * (2 * texts.CONTEXT + 8)
