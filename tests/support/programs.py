"""Small programs whose posteriors can be enumerated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from support.helpers import table_lm, tiny_llama

from bayeslm import Posterior
from bayeslm.inference import Exact
from bayeslm.inference.markov.moves import log_target
from bayeslm.inference.program import Particles, inspect
from bayeslm.models import LanguageModel

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
            score = table[positions, x].sum(-1) + constant
            pyro.deterministic("score", score, event_dim=0)
            pyro.factor("reward", score / beta)

    return model


def highest(table: torch.Tensor) -> float:
    """An upper bound of the reward of `tilted`."""
    return float(table.amax(-1).sum())


@functools.cache
def case(kind: str, beta: float) -> tuple[LanguageModel, Callable[[list[Any]], None], Posterior]:
    """A table ("table") or a small network ("llama"), a program on it, and the posterior for `PROMPTS`."""
    lm = table_lm(order=3, seed=1) if kind == "table" else tiny_llama(seed=1)
    model = tilted(lm, score_table(1), beta)
    return lm, model, Exact().run(model, PROMPTS)


# of `case`: the reward, the length, and of the first and third token two halves of the vocabulary
FUNCTIONS: list[Callable[[Posterior], Any]] = [lambda p: p.samples["score"], lambda p: p.lengths["completion"]]
FUNCTIONS += [lambda p, t=t: p.samples["completion"][..., t] < 4 for t in (0, 2)]
FUNCTIONS += [lambda p, t=t: p.samples["completion"][..., t] % 2 for t in (0, 2)]


def longer(prompts: list[Any], topic: torch.Tensor) -> np.ndarray:
    """Prompts with a latent's value behind them, an object array of the latent's shape."""
    out = np.empty(tuple(topic.shape), dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = [*prompts[index[-1]], int(topic[index]) % 3 + 1]
    return out


def conversation(reply: int = 1) -> Callable[[list[Any]], None]:
    """A topic that a prompt depends on, a factor in mid-program, a reply of so many tokens to the draft."""
    lm = table_lm(order=3, seed=1, vocab=4)
    table = 2.0 * score_table(3, vocab=4, tokens=2)

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([0.3, 0.7])))
            x = pyro.sample("completion", lm(longer(prompts, topic), max_new_tokens=2))
            pyro.factor("draft", table[torch.arange(2), x].sum(-1))
            y = pyro.sample("reply", lm(longer(prompts, x[..., 0]), max_new_tokens=reply))
            pyro.factor("match", 1.5 * (y == topic[..., None] + 1).sum(-1) + 0.5 * (x[..., :reply] == y).sum(-1))

    return model


def shared() -> Callable[[list[Any]], None]:
    """One posterior of both prompts."""
    lm = table_lm(order=2, seed=4, vocab=3)

    def model(prompts: list[Any]) -> None:
        mood = pyro.sample("mood", dist.Categorical(torch.tensor([0.6, 0.4])))
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            pyro.factor("reward", 1.5 * (x == mood[..., None] + 1).sum(-1))

    return model


def second_is_impossible(lm: LanguageModel) -> Callable[[list[Any]], None]:
    """A program whose factor "rule" no completion of the second prompt passes."""

    def model(prompts: list[Any]) -> None:
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            pyro.factor("rule", torch.where(torch.arange(len(prompts)) == 1, -torch.inf, 0.0).expand(x.shape[:-1]))

    return model


class ExactTwist:
    """psi_t(x_1:t) = E[exp(r / beta) | x_1:t] by enumeration: what a learned twist learns to be. Token 0 is the EOS."""

    reads_reward = False

    def __init__(self, exact: Posterior) -> None:
        self._known: dict[tuple[Any, int], float] = {}
        self._tokens = torch.as_tensor(exact.samples["completion"][0])  # (atom, prompt, token)
        self._joint = torch.as_tensor(exact.log_joint[0])
        self._prior = self._joint - torch.as_tensor(exact.log_likelihood["reward"][0])

    def start(self, steps: Any) -> ExactState:
        return self.read(None, steps)

    def read(self, state: Any, steps: Any) -> ExactState:
        return ExactState(steps.values[:, : steps.t].clone())

    def lookahead(self, state: ExactState, tokens: torch.Tensor) -> torch.Tensor:
        """log psi (row, k); rows are (particle, prompt)."""
        prompts = self._tokens.shape[1]
        texts = state.texts.tolist()
        each = [[self.of((*texts[i], v), i % prompts) for v in row] for i, row in enumerate(tokens.tolist())]
        return torch.tensor(each)

    def of(self, text: tuple[int, ...], prompt: int) -> float:
        text = text[: text.index(0) + 1] if 0 in text else text
        if (text, prompt) not in self._known:
            same = (self._tokens[:, prompt, : len(text)] == torch.tensor(text)).all(-1)
            mass = [x[same, prompt].logsumexp(0) for x in (self._joint, self._prior)]
            self._known[text, prompt] = float(mass[0] - mass[1])
        return self._known[text, prompt]


class ExactState(NamedTuple):
    texts: torch.Tensor  # (row, token), tokens so far

    def select(self, rows: torch.Tensor) -> ExactState:
        return ExactState(self.texts[rows])


class Enumerated:
    """A program's target at an inverse temperature, with draws of it."""

    def __init__(self, model: Callable[[list[Any]], None], gamma: float = 1.0) -> None:
        self.program = inspect(model, SHORT)
        self.atoms = Exact()._enumerate(self.program)
        target = log_target(self.atoms, gamma).double()
        self.log_prob = target - target.logsumexp(0)  # (atom, column)
        self._place = [{code: i for i, code in enumerate(column)} for column in self._codes(self.atoms)]

    def draw(self, size: int, seed: int = 0) -> Particles:
        torch.manual_seed(seed)
        index = self.log_prob.exp().T.multinomial(size, replacement=True).T
        return self.atoms.gather(self.program, index)

    def index(self, particles: Particles) -> torch.Tensor:
        """Which atom each is, (particle, column)."""
        columns = zip(self._codes(particles), self._place, strict=True)
        return torch.tensor([[place[code] for code in codes] for codes, place in columns]).T

    def _codes(self, particles: Particles) -> list[list[tuple[int, ...]]]:
        columns = self.log_prob.shape[1] if hasattr(self, "log_prob") else self.program.weight_prompts
        rows = []
        for site in self.program.latents:
            value = particles.values[site.name]
            if columns > 1:
                value = value.movedim(1 + site.dims.index("prompt"), 1)
            rows.append(value.reshape(len(value), columns, -1).long())
        codes = torch.cat(rows, -1)
        return [[tuple(row) for row in codes[:, column].tolist()] for column in range(columns)]
