r"""Preference elicitation: ask, hear, infer, and ask again.

The weights \theta of a reward are unknown, and a judge who knows better answers one question at a time, which of two
completions of a prompt is preferred. Of the answers y_1 .. y_t the posterior is

    p(\theta | y_1:t)  \propto  p(\theta) \prod_s \sigma(\pm (r_\theta(x_s) - r_\theta(x'_s)))

(`BradleyTerry`), by any engine, and by `Laplace` in milliseconds. The next pair comes from what an `Acquisition` makes
of its draws. (Of language models: Christiano et al. 2017, arXiv 1706.03741; Mehta et al. 2023, arXiv 2312.00267;
Muldrew et al. 2024, arXiv 2402.08114; Dwaracherla et al. 2024, arXiv 2402.00396.)

The next question is a function of the seed and of the answers so far and of nothing else. So a loop that was broken off
goes on from its answers as if it had not been, and an answer taken back leads to the same question again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from bayeslm.inference.importance import ImportanceSampling
from bayeslm.inference.laplace import Laplace
from bayeslm.inference.program import check_counts, check_positive, seeded
from bayeslm.models import TiltedLM
from bayeslm.models.lm import LanguageModel
from bayeslm.models.preferences import Answer, BradleyTerry, Judge, Question, UncertainReward, answered
from bayeslm.posterior import Posterior

from .acquisition import Acquisition, InformationGain

NUM_DRAWS = 256  # of the posterior, that questions are chosen by
TRIES = 100  # at fresh completions of which two were not compared before


@dataclass(frozen=True)
class Pool:
    """Completions to compare, as a rule draws of the prior: ``completions[i]`` is one of ``prompts[i]``.

    Blank completions, and those that a prompt has already, are left out.

    :raises ValueError: if the lists are not of one length, or no prompt has two completions that differ.
    """

    prompts: list[str]
    completions: list[str]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.completions)} completions: one for each")
        rows = dict.fromkeys(row for row in zip(self.prompts, self.completions, strict=True) if row[1].strip())
        object.__setattr__(self, "prompts", [prompt for prompt, _ in rows])
        object.__setattr__(self, "completions", [completion for _, completion in rows])
        if len(rows) == len(set(self.prompts)):
            raise ValueError("no prompt has two completions that differ: there is nothing to compare, draw more")

    @classmethod
    def drawn(
        cls,
        lm: LanguageModel,
        prompts: Sequence[str],
        num_completions: int = 16,
        *,
        max_new_tokens: int = 24,
        temperature: float = 1.0,
        seed: int | None = 0,
    ) -> Pool:
        """So many draws of the language model for each prompt."""
        with seeded(seed):
            law = lm(list(prompts), max_new_tokens=max_new_tokens, temperature=temperature)
            texts = lm.decode(law.sample(torch.Size([num_completions])))  # (completion, prompt)
        return cls(list(prompts) * num_completions, texts.ravel().tolist())

    def __call__(self, weights: Tensor, answers: Sequence[Answer] = ()) -> Pool:
        """Itself, whatever is known: a pool is a source of candidates."""
        return self

    @property
    def example(self) -> tuple[str, str]:
        """A prompt and a text, for the features' number."""
        return self.prompts[0], self.completions[0]

    @cached_property
    def prompt_indices(self) -> Tensor:
        """Which prompt each is a completion of, (completion,)."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([index[prompt] for prompt in self.prompts])

    def pairs(self, answers: Sequence[Answer] = ()) -> Tensor:
        """Pairs of completions of one prompt that were not asked about, indices (pair, 2), the lower first."""
        left = (self.prompt_indices[:, None] == self.prompt_indices).triu(1)
        for answer in answers:
            i, j = (self._at.get((answer.prompt, text)) for text in (answer.first, answer.second))
            if i is not None and j is not None:
                left[min(i, j), max(i, j)] = False
        return left.nonzero()

    @cached_property
    def _at(self) -> dict[tuple[str, str], int]:
        return {row: i for i, row in enumerate(zip(self.prompts, self.completions, strict=True))}


@dataclass(frozen=True)
class FreshCompletions:
    """New completions for each question, drawn from the current posterior over them.

    One prompt is picked at random. Each of its completions is drawn by an engine from

        \\pi(x)  \\propto  p(x) exp(r(x) / beta),

    r being the reward of a fresh draw of the weights (Thompson sampling: marginally x has the posterior with the reward
    uncertain), or, with ``epsilon``, the mean reward, and with probability epsilon 0: the prior.

    :param prior: the language model.
    :param prompts: prompts to ask about.
    :param model: the program whose weights are learned.
    :param beta: the KL coefficient, in the units of the learned reward: log-odds.
    :param engine: draws the completions, each time others: a seed of its own is passed over.
    :param epsilon: of the epsilon-greedy choice of the reward; None is Thompson sampling.
    :param num_completions: candidates for each question.
    :raises ValueError: if a setting is out of range, or there is no prompt.
    """

    prior: LanguageModel
    prompts: Sequence[str]
    model: BradleyTerry
    beta: float = 0.5
    engine: Any = field(default_factory=lambda: ImportanceSampling(num_particles=16, progress=False))
    epsilon: float | None = None
    num_completions: int = 2
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        check_counts(self, "num_completions", "max_new_tokens")
        check_positive(self, "beta")
        if self.num_completions < 2:
            raise ValueError(f"FreshCompletions: num_completions must be at least 2, got {self.num_completions}")
        if self.epsilon is not None and not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"FreshCompletions: epsilon must be in [0, 1], got {self.epsilon}")
        if not self.prompts:
            raise ValueError("FreshCompletions: give at least one prompt")

    def __call__(self, weights: Tensor, answers: Sequence[Answer] = ()) -> Pool:
        """Completions of which two at least were not compared before; blank, alike and known ones are drawn anew.

        :raises ValueError: if there were none in `TRIES` tries.
        """
        for _ in range(TRIES):
            prompt = self.prompts[int(torch.randint(len(self.prompts), ()))]
            texts = [self._draw(prompt, self._weights(weights)) for _ in range(self.num_completions)]
            if len({text for text in texts if text.strip()}) < 2:
                continue
            pool = Pool([prompt] * len(texts), texts)
            if len(pool.pairs(answers)):
                return pool
        raise ValueError(
            f"FreshCompletions: {TRIES} times the completions were blank, alike or compared before: "
            "a larger beta, longer texts (max_new_tokens) or more prompts make others"
        )

    @property
    def example(self) -> tuple[str, str]:
        """A prompt and a text, for the features' number."""
        return self.prompts[0], self.prompts[0]

    def _weights(self, weights: Tensor) -> Tensor:
        """The weights (d,) that a completion is drawn by."""
        if self.epsilon is None:
            return weights[torch.randint(len(weights), ())]
        return torch.zeros_like(weights[0]) if torch.rand(()) < self.epsilon else weights.mean(0)

    def _draw(self, prompt: str, weights: Tensor) -> str:
        reward = UncertainReward(self.model, weights[None], "mean")
        tilted = TiltedLM(self.prior, reward, self.beta, max_new_tokens=self.max_new_tokens)
        seeded_itself = getattr(self.engine, "seed", None) is not None
        posterior = (replace(self.engine, seed=None) if seeded_itself else self.engine).run(tilted, [prompt])
        (draw,) = posterior.resample(1, seed=int(torch.randint(2**31, ()))).texts["completion"][0]
        return str(draw[0])


@dataclass(frozen=True)
class Elicitation:
    """A loop of questions, and what is known after each answer.

    :param model: the program whose ``weights`` are learned from comparisons.
    :param acquisition: chooses the pair: `InformationGain` to know which of any two is better, `Duel` for good ones.
    :param engine: infers the weights anew after each answer; by default draws of Laplace's normal law, without weights.
    :param seed: with the answers so far it determines the next question.
    """

    model: BradleyTerry
    acquisition: Acquisition = field(default_factory=InformationGain)
    engine: Any = field(default_factory=lambda: Laplace(NUM_DRAWS, weighted=False))
    seed: int = 0

    def posterior(self, answers: Sequence[Answer]) -> Posterior:
        """The posterior over weights.

        :raises ValueError: if nothing was answered.
        """
        data = answered(answers)
        if data is None:
            raise ValueError("no question has an answer: the posterior is the prior")
        with self._seeded(answers):
            return self.engine.run(self.model, data)

    def weights(self, answers: Sequence[Answer], example: tuple[str, str]) -> Tensor:
        """Draws (draw, d) of the posterior, or of the prior before the first answer; equally weighted.

        :param example: any prompt and completion, for the features' number d.
        """
        if answered(answers) is not None:
            samples = self.posterior(answers).resample().samples["weights"]
            return torch.as_tensor(samples).flatten(0, 1)
        x = self.model.featurise([example[0]], [example[1]])
        with self._seeded(answers), pyro.plate("draws", NUM_DRAWS):
            return self.model.weights(x)

    def ask(self, candidates: Pool | FreshCompletions, answers: Sequence[Answer] = ()) -> Question | None:
        """The next question, in the order that is to be shown; None if a pool has no pair left.

        The order is random, so that a judge who likes the first the better teaches nothing.
        """
        weights = self.weights(answers, candidates.example)
        with self._seeded(answers):
            pool = candidates(weights, answers)
            pairs = pool.pairs(answers)
            if not len(pairs):
                return None
            rewards = self.model.reward(pool.prompts, pool.completions, weights).cpu()  # (draw, completion)
            i, j = pairs[self.acquisition.choose(rewards, pairs, pool.prompt_indices)].tolist()
            if torch.rand(()) < 0.5:
                i, j = j, i
            probability = (rewards[:, i] - rewards[:, j]).sigmoid().mean()
            return Question(pool.prompts[i], pool.completions[i], pool.completions[j], float(probability))

    def run(
        self, candidates: Pool | FreshCompletions, judge: Judge, answers: list[Answer] | None = None
    ) -> Iterator[Answer]:
        """Answers, one by one, until the pool has no pair left: take as many as you want.

        :param answers: those that there are already. New ones are appended before they are yielded, so that a judge who
            raises loses none.
        """
        answers = [] if answers is None else answers
        while (question := self.ask(candidates, answers)) is not None:
            answer = question.answered(judge(question.prompt, question.first, question.second))
            answers.append(answer)
            yield answer

    def _seeded(self, answers: Sequence[Answer]) -> Any:
        """The random state of the question after so many answers."""
        return seeded(int(np.random.SeedSequence([self.seed, len(answers)]).generate_state(1)[0]))
