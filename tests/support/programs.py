"""Small programs whose posteriors can be enumerated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from support.models import table_lm, tiny_llama

from bayeslm import Posterior
from bayeslm.inference import Exact
from bayeslm.models import LanguageModel, rewards

# Token ids of different lengths. (A prompt that repeats one token is no test of SVI on a Transformer without
# absolute positions: it cannot tell [5] from [5, 5], whatever its weights.)
PROMPTS = [[2, 3, 4], [5, 6]]
SHORT = [[1, 2], [2]]
TOKENS = 5


def score_table(seed: int, vocab: int = 8, tokens: int = TOKENS, scale: float = 0.5) -> torch.Tensor:
    """A reward a position and token, (tokens, vocab)."""
    return scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


def tilted(
    lm: LanguageModel, table: torch.Tensor, beta: float = 1.0, constant: float = 0.0
) -> Callable[[list[Any]], None]:
    """``completion`` ~ lm, reward = sum of the table over all positions (padding too) + constant."""
    positions = torch.arange(len(table))

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=len(table)))
            rewards.factor("reward", table[positions, x].sum(-1) + constant, beta)

    return model


def rewarded(
    lm: LanguageModel, tokens: int, reward: Callable[[torch.Tensor], torch.Tensor], name: str = "reward"
) -> Callable[[list[Any]], None]:
    """``completion`` ~ lm, and a factor that is a function of its tokens (*, prompt, token)."""

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            pyro.factor(name, reward(pyro.sample("completion", lm(prompts, max_new_tokens=tokens))))

    return model


def normal_mean(y: Any, noise: float = 1.0) -> Callable[[list[Any]], None]:
    """theta ~ N(0, 1) and y ~ N(theta, noise^2) for each prompt, y being a number or one a prompt."""

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, noise), obs=torch.as_tensor(y).expand(len(prompts)))

    return model


def highest(table: torch.Tensor) -> float:
    """An upper bound of the reward of `tilted`."""
    return float(table.amax(-1).sum())


@functools.cache
def case(kind: str, beta: float, seed: int = 1) -> tuple[LanguageModel, Callable[[list[Any]], None], Posterior]:
    """A table ("table") or a small network ("llama"), a program on it, and its posterior for `PROMPTS`.

    8 words and 5 tokens: 19,608 completions a prompt.
    """
    lm = table_lm(order=3, seed=seed) if kind == "table" else tiny_llama(seed=seed)
    model = tilted(lm, score_table(seed), beta)
    return lm, model, Exact().run(model, PROMPTS)


def token_is(t: int, token: int) -> Callable[[Posterior], Any]:
    """A function of a posterior: whether a completion's token at ``t`` is this one."""
    return lambda posterior: (posterior.samples["completion"][..., t] == token) * 1.0


# of `case`: the reward, the length, and of the first and third token two halves of the vocabulary
FUNCTIONS: list[Callable[[Posterior], Any]] = [lambda p: p.rewards["reward"], lambda p: p.lengths["completion"]]
FUNCTIONS += [lambda p, t=t: p.samples["completion"][..., t] < 4 for t in (0, 2)]
FUNCTIONS += [lambda p, t=t: p.samples["completion"][..., t] % 2 for t in (0, 2)]


def longer(prompts: list[Any], topic: torch.Tensor) -> np.ndarray:
    """Prompts with a latent's value behind them, an object array of the latent's shape."""
    out = np.empty(tuple(topic.shape), dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = [*prompts[index[-1]], int(topic[index]) % 3 + 1]
    return out


def conversation(reply: int = 1, batch_size: int | None = None) -> Callable[[list[Any]], None]:
    """A topic that a prompt depends on, a factor in mid-program, a reply of so many tokens to the draft."""
    lm = table_lm(order=3, seed=1, vocab=4)
    lm.batch_size = batch_size
    table = 2.0 * score_table(3, vocab=4, tokens=2)

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.3, 0.7])))
            x = pyro.sample("completion", lm(longer(prompts, topic), max_new_tokens=2))
            pyro.factor("draft", table[torch.arange(2), x].sum(-1))
            y = pyro.sample("reply", lm(longer(prompts, x[..., 0]), max_new_tokens=reply))
            pyro.factor("match", 1.5 * (y == topic[..., None] + 1).sum(-1) + 0.5 * (x[..., :reply] == y).sum(-1))

    return model


def shared(vocab: int = 3) -> Callable[[list[Any]], None]:
    """One posterior of both prompts."""
    lm = table_lm(order=2, seed=4, vocab=vocab)

    def model(prompts: list[Any]) -> None:
        mood = pyro.sample("mood", dist.Categorical(torch.tensor([0.6, 0.4])))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", 1.5 * (x == mood[..., None] + 1).sum(-1))

    return model


def second_is_impossible(lm: LanguageModel) -> Callable[[list[Any]], None]:
    """A program whose factor "rule" no completion of the second prompt passes."""
    return rewarded(lm, 3, lambda x: torch.tensor([0.0, -torch.inf]).expand(x.shape[:-1]), "rule")
