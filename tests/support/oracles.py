"""Answers found another way: by enumeration, or from a network's own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.programs import SHORT
from torch import Tensor

from bayeslm import Posterior
from bayeslm.inference import Exact
from bayeslm.inference.markov.tempering import log_target
from bayeslm.inference.program import Particles, assign_values, inspect, run_particles
from bayeslm.models import LanguageModel
from bayeslm.models.lm import Twist


def expectation(exact: Posterior, values: Any) -> Any:
    """The mean of values (1, atom, prompt) under an enumerated posterior, (prompt,)."""
    return (exact.weights() * values).sum((0, 1))


def by_hand(lm: LanguageModel, prompt: list[int], completion: Tensor, temperature: float = 1.0) -> Tensor:
    """Token log-probabilities of one completion, from the network's own logits of the unpadded whole; 0 on padding."""
    ends = [t for t, token in enumerate(completion.tolist()) if token in lm.eos_token_ids]
    length = ends[0] + 1 if ends else len(completion)
    start, written = list(lm.decoder_start_ids), completion[:length].tolist()
    ids = torch.tensor([prompt if start else prompt + written], device=lm.device)
    given = {"decoder_input_ids": torch.tensor([start + written], device=lm.device)} if start else {}
    logits = lm.network(input_ids=ids, **given).logits[0, len(start or prompt) - 1 : -1].float() / temperature
    scores = logits.log_softmax(-1).gather(-1, completion[:length, None]).squeeze(-1)
    return torch.nn.functional.pad(scores, (0, len(completion) - length))


def all_by_hand(lm: LanguageModel, prompts: list[list[int]], completions: Tensor, temperature: float = 1.0) -> Tensor:
    """`by_hand` of completions (particle, prompt, token)."""
    rows = [[by_hand(lm, p, c, temperature) for p, c in zip(prompts, row, strict=True)] for row in completions]
    return torch.stack([torch.stack(row) for row in rows])


def kl_to(exact: Posterior, policy: LanguageModel, prompts: list[Any]) -> Tensor:
    """KL(q || pi*) of a policy to an enumerated posterior of completions, (prompt,)."""
    x = torch.as_tensor(exact.samples["completion"][0])
    with torch.no_grad():
        log_q = policy(prompts, max_new_tokens=x.shape[-1]).log_prob(x).double()
    return (log_q.exp() * (log_q - torch.as_tensor(exact.log_joint[0] - exact.log_evidence))).sum(0)


def assert_same_distribution(one: LanguageModel, other: LanguageModel) -> None:
    """Assert that completions drawn from one model have the same probability under the other."""
    prompts = [[1, 2, 3], [4]]
    x = one(prompts, 5).sample((6,))
    torch.testing.assert_close(one(prompts, 5).log_prob(x), other(prompts, 5).log_prob(x), atol=1e-5, rtol=1e-5)


class ExactTwist(Twist):
    """psi_t(x_1:t) = E[exp(r / beta) | x_1:t] by enumeration: the optimum of a learned twist. Token 0 is the EOS."""

    reads_reward = False

    def __init__(self, exact: Posterior) -> None:
        torch.nn.Module.__init__(self)  # no network: none of a learned twist's parameters
        self._known: dict[tuple[Any, int], float] = {}
        self._tokens = torch.as_tensor(exact.samples["completion"][0])  # (atom, prompt, token)
        self._joint = torch.as_tensor(exact.log_joint[0])
        self._prior = self._joint - torch.as_tensor(exact.log_likelihood["reward"][0])

    def start(self, steps: Any) -> ExactState:
        return self.advance(None, steps)

    def advance(self, state: Any, steps: Any) -> ExactState:
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
        exact = Exact(num_prior_samples=1).run(model, SHORT)
        values = {site.name: torch.as_tensor(exact.samples[site.name][0]) for site in self.program.latents}
        with assign_values(self.program, values):
            self.atoms = run_particles(self.program, None, exact.stats["atoms"])
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
