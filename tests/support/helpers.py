"""Small language models that are known exactly, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bayeslm.models import LanguageModel
from bayeslm.models.lm import word_tokenizer

WORDS = ("<eos>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")


def table_lm(order: int = 3, seed: int = 0, vocab: int = 8) -> LanguageModel:
    """An n-gram table with standard normal logits over ``vocab`` words, the first of which ends a text."""
    return LanguageModel.tabular(WORDS[:vocab], order=order, seed=seed)


def llama_network(seed: int = 0, scale: float = 2.0, **config: Any) -> LlamaForCausalLM:
    """A random Llama whose logits have standard deviation ``scale`` and depend on all of the context."""
    settings: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,  # transformers fixes the embedding of a pad token at zero, and 0 also begins texts
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        torch.nn.init.normal_(network.lm_head.weight, std=scale / network.config.hidden_size**0.5)
    return network


def tiny_llama(seed: int = 0, scale: float = 2.0, **settings: Any) -> LanguageModel:
    """`llama_network` with the vocabulary of `table_lm`; ``settings`` go to `LanguageModel`."""
    return LanguageModel(llama_network(seed, scale), word_tokenizer(WORDS[:8], "<eos>"), **settings)


COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_network(model_type: str, **extra: Any) -> PreTrainedModel:
    """A random network of an architecture of transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(COMMON | extra)))


def by_hand(lm: LanguageModel, prompt: list[int], completion: Tensor, temperature: float = 1.0) -> Tensor:
    """Token log-probabilities of one completion, from the network's own logits of the unpadded whole; 0 on padding."""
    ends = [t for t, token in enumerate(completion.tolist()) if token in lm.eos_token_ids]
    length = ends[0] + 1 if ends else len(completion)
    ids = torch.tensor([prompt + completion[:length].tolist()], device=lm.device)
    logits = lm.network(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    scores = logits.log_softmax(-1).gather(-1, completion[:length, None]).squeeze(-1)
    return torch.nn.functional.pad(scores, (0, len(completion) - length))


def assert_drawn_from(counts: Tensor, log_prob: Tensor) -> None:
    """Pearson's chi-square test that counts (values,) are draws of a law; it fails by chance once in a million.

    Values expected fewer than 5 times are counted together, so that the statistic is chi-square.
    """
    expected = counts.sum() * log_prob.double().exp()
    assert (counts[expected == 0] == 0).all(), "a value of probability 0 was drawn"
    rare = expected < 5
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    means = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen, means = seen[means > 0], means[means > 0]
    statistic = float(((seen - means) ** 2 / means).sum())
    assert statistic < chi2.isf(1e-6, max(1, len(means) - 1)), (statistic, len(means))


def count_completions(draws: Tensor, support: Tensor, vocab: int) -> Tensor:
    """How often each completion of ``support`` (values, tokens) occurs among ``draws`` (draws, tokens)."""
    digits = vocab ** torch.arange(draws.shape[-1])
    codes, order = (support * digits).sum(-1).sort()
    drawn = (draws * digits).sum(-1)
    place = torch.searchsorted(codes, drawn).clamp_max(len(codes) - 1)
    assert (codes[place] == drawn).all(), "a draw is not in the support"
    return torch.bincount(order[place], minlength=len(codes))


def assert_same_law(one: LanguageModel, other: LanguageModel) -> None:
    """Completions drawn from one have the same probability under the other."""
    prompts = [[1, 2, 3], [4]]
    x = one(prompts, 5).sample((6,))
    torch.testing.assert_close(one(prompts, 5).log_prob(x), other(prompts, 5).log_prob(x), atol=1e-5, rtol=1e-5)
