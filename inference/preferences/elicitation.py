r"""Preference elicitation: a loop of questions and answers that infers a reward.

The weights \theta of a reward are unknown. A judge answers one question at a time: which of two completions of a prompt
is preferred. The posterior, given the answers y_1 .. y_t, is

    p(\theta | y_1:t)  \propto  p(\theta) \prod_s \sigma(\pm (r_\theta(x_s) - r_\theta(x'_s)))

(`BradleyTerry`). Any engine infers it; `Laplace` does so in milliseconds. An `Acquisition` chooses the next pair from
draws of this posterior. (For language models: Christiano et al. 2017, arXiv 1706.03741; Mehta et al. 2023, arXiv
2312.00267; Muldrew et al. 2024, arXiv 2402.08114; Dwaracherla et al. 2024, arXiv 2402.00396.)

The next question is a function of the seed and of the answers so far only. A loop that is resumed from its answers
therefore asks the same questions as one that was not interrupted, and an answer that is taken back leads to the same
question again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from bayeslm.inference import ImportanceSampling, Laplace
from bayeslm.inference.program import Engine, seeded
from bayeslm.models import TiltedLM
from bayeslm.models.lm import LanguageModel
from bayeslm.models.preferences import Answer, BradleyTerry, Judge, Question, UncertainReward, to_comparisons
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, Positive, Seed, Share, Within, validated

from .acquisition import Acquisition, InformationGain

NUM_DRAWS = 256  # draws of the posterior by which a question is chosen
TRIES = 100  # attempts to draw two fresh completions that were not compared before


@validated
@dataclass(frozen=True)
class Pool:
    """A fixed set of completions to compare.

    Blank completions and repetitions are removed.

    :param prompts: the prompt of each completion.
    :param completions: usually draws from the prior.
    :raises ValueError: if the lists differ in length, or no prompt has two different completions.
    """

    prompts: list[str]
    completions: list[str]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.completions)} completions: give one for each")
        rows = dict.fromkeys(row for row in zip(self.prompts, self.completions, strict=True) if row[1].strip())
        object.__setattr__(self, "prompts", [prompt for prompt, _ in rows])
        object.__setattr__(self, "completions", [completion for _, completion in rows])
        if len(rows) == len(set(self.prompts)):
            raise ValueError("no prompt has two different completions, so there is nothing to compare: draw more")

    @classmethod
    @validated
    def drawn(
        cls,
        lm: LanguageModel,
        prompts: Sequence[str],
        num_completions: Count = 16,
        *,
        max_new_tokens: Count = 24,
        temperature: Positive = 1.0,
        seed: Seed | None = 0,
    ) -> Pool:
        """Draw completions of each prompt from a language model.

        :param num_completions: number of draws for each prompt.
        :param max_new_tokens: length of the longest completion, in tokens.
        :param temperature: divides the model's logits.
        :param seed: seed of the draws; None draws from the global random state.
        """
        with seeded(seed):
            completion = lm(list(prompts), max_new_tokens=max_new_tokens, temperature=temperature)
            texts = completion.decode(completion.sample(torch.Size([num_completions])))  # (completion, prompt)
        return cls(list(prompts) * num_completions, texts.ravel().tolist())

    def __call__(self, weights: Tensor, answers: Sequence[Answer] = ()) -> Pool:
        """Return this pool: its candidates do not depend on the answers, unlike those of `FreshCompletions`."""
        return self

    @property
    def example(self) -> tuple[str, str]:
        """A prompt and a text, from which the number of features is found."""
        return self.prompts[0], self.completions[0]

    @cached_property
    def prompt_indices(self) -> Tensor:
        """The index of each completion's prompt, (completion,)."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([index[prompt] for prompt in self.prompts])

    def pairs(self, answers: Sequence[Answer] = ()) -> Tensor:
        """Return the pairs of completions of one prompt that were not asked about, indices (pair, 2), lower first."""
        asked = {
            (self._indices.get((answer.prompt, text)), self._indices.get((answer.prompt, other)))
            for answer in answers
            for text, other in ((answer.first, answer.second), (answer.second, answer.first))
        }
        remaining = [pair for pair in self._pairs if pair not in asked]
        return torch.tensor(remaining, dtype=torch.long).reshape(-1, 2)

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """All pairs of completions of one prompt; as many as a prompt has, squared, not as the pool has."""
        completions: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            completions.setdefault(prompt, []).append(i)
        return sorted(pair for indices in completions.values() for pair in itertools.combinations(indices, 2))

    @cached_property
    def _indices(self) -> dict[tuple[str, str], int]:
        return {row: i for i, row in enumerate(zip(self.prompts, self.completions, strict=True))}


@validated
@dataclass(frozen=True)
class FreshCompletions:
    r"""New completions for each question, drawn from the current posterior over completions.

    One prompt is picked at random. An engine draws each of its completions from

        \pi(x)  \propto  p(x) exp(r(x) / beta)

    where r is the reward of a fresh draw of the weights (Thompson sampling: the marginal distribution of x integrates
    over the uncertain reward). With ``epsilon``, r is the mean reward instead, or with probability epsilon 0, so that x
    is a draw from the prior.

    :param prior: the language model.
    :param prompts: prompts to ask about.
    :param model: the program whose weights are learned.
    :param beta: the KL coefficient, in units of the learned reward, which are log-odds.
    :param engine: draws the completions; its own ``seed`` is ignored, so that draws differ.
    :param epsilon: probability of the prior in the epsilon-greedy choice of the reward; None is Thompson sampling.
    :param num_completions: number of candidates for each question.
    :param max_new_tokens: length of the longest completion, in tokens.
    :raises ValueError: if a setting is out of range, or there is no prompt.
    """

    prior: LanguageModel
    prompts: Sequence[str]
    model: BradleyTerry
    beta: Positive = 0.5
    engine: Engine = field(default_factory=lambda: ImportanceSampling(num_particles=16, progress=False))
    epsilon: Share | None = None
    num_completions: Annotated[int, Within("[2, inf)")] = 2
    max_new_tokens: Count = 24

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("FreshCompletions: give at least one prompt")

    def __call__(self, weights: Tensor, answers: Sequence[Answer] = ()) -> Pool:
        """Draw completions of which at least two are different, not blank, and were not compared before.

        :param weights: draws of the posterior of the weights, (draw, d).
        :param answers: the answers so far.
        :raises ValueError: if `TRIES` attempts fail.
        """
        for _ in range(TRIES):
            prompt = self.prompts[int(torch.randint(len(self.prompts), ()))]
            texts = [self.draw(prompt, weights) for _ in range(self.num_completions)]
            if len({text for text in texts if text.strip()}) < 2:
                continue
            pool = Pool([prompt] * len(texts), texts)
            if len(pool.pairs(answers)):
                return pool
        raise ValueError(
            f"FreshCompletions: {TRIES} times the completions were blank, equal or compared before: "
            "use a larger beta, longer texts (max_new_tokens) or more prompts"
        )

    @property
    def example(self) -> tuple[str, str]:
        """A prompt and a text, from which the number of features is found."""
        return self.prompts[0], self.prompts[0]

    def draw(self, prompt: str, weights: Tensor) -> str:
        """Draw a completion of a prompt from the posterior.

        :param weights: draws of the posterior of the weights, (draw, d).
        """
        if self.epsilon is None:
            drawn = weights[torch.randint(len(weights), ())]
        else:
            drawn = torch.zeros_like(weights[0]) if torch.rand(()) < self.epsilon else weights.mean(0)
        reward = UncertainReward(self.model, drawn[None], "mean")
        tilted = TiltedLM(self.prior, reward, self.beta, max_new_tokens=self.max_new_tokens)
        engine: Any = self.engine
        has_seed = getattr(engine, "seed", None) is not None
        posterior = (replace(engine, seed=None) if has_seed else engine).run(tilted, [prompt])
        (draw,) = posterior.resample(1, seed=int(torch.randint(2**31, ()))).texts["completion"][0]
        return str(draw[0])


@validated
@dataclass(frozen=True)
class Elicitation:
    """A loop of questions and the posterior after each answer.

    :param model: the program whose ``weights`` are learned from comparisons.
    :param acquisition: chooses the pair: `InformationGain` to learn which of any two completions is better, `Duel` to
        find good ones.
    :param engine: infers the weights anew after each answer; by default unweighted draws of the Laplace approximation.
    :param seed: determines the next question, together with the answers so far.
    :param timeout: the time limit of a judge's answer in seconds; None for no limit.
    """

    model: BradleyTerry
    acquisition: Acquisition = field(default_factory=InformationGain)
    engine: Engine = field(default_factory=lambda: Laplace(NUM_DRAWS, weighted=False))
    seed: Seed = 0
    timeout: Positive | None = None

    def posterior(self, answers: Sequence[Answer]) -> Posterior:
        """Infer the posterior of the weights.

        :raises ValueError: if no question was answered.
        """
        data = to_comparisons(answers)
        if data is None:
            raise ValueError("no question was answered, so the posterior is the prior: answer one first")
        with self._seeded(answers):
            return self.engine.run(self.model, data)

    def weights(self, answers: Sequence[Answer], example: tuple[str, str]) -> Tensor:
        """Draw weights, (draw, d), from the posterior, or from the prior if no question was answered.

        :param example: any prompt and completion, from which the number of features d is found.
        """
        if to_comparisons(answers) is not None:
            samples = self.posterior(answers).resample().samples["weights"]
            return torch.as_tensor(samples).flatten(0, 1)
        x = self.model.featurise([example[0]], [example[1]])
        with self._seeded(answers), pyro.plate("draws", NUM_DRAWS):
            return self.model.weights(x)

    def ask(self, candidates: Pool | FreshCompletions, answers: Sequence[Answer] = ()) -> Question | None:
        """Choose the next question; None if all pairs of a pool were asked about.

        The order of its completions is random, so that a judge's preference for the first has no effect on average.
        """
        weights = self.weights(answers, candidates.example)
        with self._seeded(answers):
            pool = candidates(weights, answers)
            pairs = pool.pairs(answers)
            if not len(pairs):
                return None
            rewards = self.model.reward(pool.prompts, pool.completions, weights).cpu()  # (draw, completion)
            chosen = self.acquisition.choose(rewards.clone(), pairs.clone(), pool.prompt_indices.clone())
            i, j = pairs[chosen].tolist()
            if torch.rand(()) < 0.5:
                i, j = j, i
            probability = (rewards[:, i] - rewards[:, j]).sigmoid().mean()
            return Question(pool.prompts[i], pool.completions[i], pool.completions[j], float(probability))

    def run(
        self, candidates: Pool | FreshCompletions, judge: Judge, answers: list[Answer] | None = None
    ) -> Iterator[Answer]:
        """Ask and yield answers one by one, until all pairs of the pool were asked about.

        :param candidates: the completions to compare.
        :param judge: answers the questions.
        :param answers: the answers so far. Each new one is appended before it is yielded, so that none is lost if the
            judge raises an exception.
        :raises JudgeError: if the judge does not answer within ``timeout``.
        """
        answers = [] if answers is None else answers
        while (question := self.ask(candidates, answers)) is not None:
            answer = question.put_to(judge, self.timeout)
            answers.append(answer)
            yield answer

    def _seeded(self, answers: Sequence[Answer]) -> Any:
        """Seed the random numbers of the question that follows these answers."""
        return seeded(int(np.random.SeedSequence([self.seed, len(answers)]).generate_state(1)[0]))
