r"""The built-in program: a prior tilted by a reward.

    \pi^*(x | c) = p(x | c) \exp(r(c, x) / \beta) / Z(c)

the posterior whose variational inference is KL-penalised reinforcement learning (Korbak, Perez and Buckley 2022,
arXiv 2205.11275). With a power \alpha of the prior,

    \pi^*(x | c) = p(x | c)^\alpha \exp(r(c, x) / \beta) / Z(c)

which sharpens whole texts where a temperature of 1 / \alpha sharpens one token at a time (Karan and Du 2025, arXiv
2510.14901).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pyro
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from bayeslm.models.lm import (
    Autoregressive,
    LanguageModel,
    Prompt,
    check_stop,
    on_host,
    read_table,
    subsample_of,
    without_index,
)
from bayeslm.models.rewards import Reward, RewardFunction, factor, with_trainer_arguments
from bayeslm.short_repr import call
from bayeslm.validation import Count, Positive, Unchecked, Within, validated

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "stop")  # of the prior's distribution


@validated
class TiltedLM:
    r"""A Pyro program: ``completion`` ~ prior, ``reward`` = factor r / beta, with r recorded (`rewards.factor`).

    With a ``power`` it has one more factor, ``power`` = (alpha - 1) log p(x).

    :param prior: the frozen language model.
    :param reward: any function of (prompts, completions, **columns), see `bayeslm.models.rewards`. None: no reward.
    :param beta: the KL coefficient; the smaller it is, the sharper is the posterior.
    :param max_new_tokens: the longest completion.
    :param temperature: divides the prior's logits.
    :param top_k: of each token the k likeliest remain, renormalised; None: all. A policy in the prior's place has, of
        each token, what remains of the prior, renormalised (`Autoregressive.with_model`).
    :param top_p: of each token the fewest likeliest with this probability remain, renormalised; None: all.
    :param stop: a string, or several, that end a completion as an end token does; they are part of it.
    :param power: alpha, of p as the settings above leave it. ``SMC(twist=Power(alpha))`` is made for it.
    :param subsample_size: prompts in each run of the program, chosen at random by Pyro's plate: the minibatch of a
        training step. None: all of them.
    :raises TypeError: if ``stop`` is no string, or the prior has no tokenizer to read it with.
    :raises ValueError: if ``beta``, ``temperature`` or ``power`` is not positive and finite, ``max_new_tokens``,
        ``top_k`` or ``subsample_size`` < 1, ``top_p`` is not in (0, 1], or ``stop`` holds an empty string.
    """

    stands_alone = True  # engines need not try whether particles of this very class mix

    def __init__(
        self,
        prior: LanguageModel,
        reward: Reward | RewardFunction | None,
        beta: Positive = 0.1,
        *,
        max_new_tokens: Count = 24,
        temperature: Positive = 1.0,
        top_k: Count | None = None,
        top_p: Annotated[float, Within("(0, 1]")] | None = None,
        stop: Annotated[str | Sequence[str] | None, Unchecked] = None,
        power: Positive = 1.0,
        subsample_size: Count | None = None,
    ) -> None:
        self.prior = prior
        self.reward = reward if reward is None or isinstance(reward, Reward) else Reward(reward)
        self.beta = beta
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.stop = None if stop is None else check_stop(stop, prior.tokenizer)
        self.power = power
        self.subsample_size = subsample_size

    def __repr__(self) -> str:
        settings = ("prior", "reward", "beta", *SETTINGS, "power", "subsample_size")
        return call("TiltedLM", {name: getattr(self, name) for name in settings})

    @property
    def prior_settings(self) -> dict[str, Any]:
        """The settings of the prior's distribution: the arguments of `LanguageModel.forward` after the prompts."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def log_bound(self) -> float:
        """An upper bound of the log-likelihood, for rejection sampling; inf if there is none.

        It is that of r / beta, and, as log p is at most 0, of (alpha - 1) log p where alpha is at least 1.
        """
        if self.power < 1.0:
            return math.inf
        return 0.0 if self.reward is None else self.reward.upper_bound / self.beta

    def program_arguments(
        self, prompts: Any, /, **columns: Sequence[Any]
    ) -> tuple[tuple[Sequence[Prompt]], dict[str, Sequence[Any]]]:
        """Return prompts and columns of what the program is called with, which engines read once a run.

        :raises TypeError: if prompts or a column have no order, as sets, or no length.
        :raises ValueError: if there are no prompts, or a table has no column "prompt", columns of different lengths,
            or one that ``columns`` has too.
        """
        prompts, own = read_table(prompts)
        if twice := own.keys() & columns.keys():
            raise ValueError(f"column {min(twice)!r} is in the table and an argument too: give it once")
        given = {name: without_index(f"column {name!r}", column) for name, column in columns.items()}
        prompts = without_index("prompts", prompts)
        if not hasattr(prompts, "__len__"):
            raise TypeError(f"prompts must be a list of prompts, got a {type(prompts).__name__}")
        if not len(prompts):
            raise ValueError("prompts is empty: give at least one")
        return (prompts,), {**own, **given}

    def some_prompts(
        self, batch: Tensor, prompts: Sequence[Prompt], /, **columns: Sequence[Any]
    ) -> tuple[tuple[Sequence[Prompt]], dict[str, Sequence[Any]]]:
        """Return what the program is called with for some of its prompts, of what `program_arguments` returned.

        :param batch: indices of prompts.
        """
        some = {name: _some(name, column, batch, len(prompts)) for name, column in columns.items()}
        return ([prompts[i] for i in batch.tolist()],), some

    def __call__(self, prompts: Any, /, **columns: Sequence[Any]) -> None:
        """Run the program.

        :param prompts: strings, chats or token ids, as for `LanguageModel`. Or a table with a column "prompt": a
            mapping of columns, a list of rows, a ``datasets.Dataset`` or a slice of one, or a DataFrame; its other
            columns are then arguments of the reward.
        :param columns: further arguments of the reward; those with one value a prompt are subsampled as prompts are.
        """
        (prompts,), columns = self.program_arguments(prompts, **columns)
        size = subsample_of(self.subsample_size, len(prompts))
        with pyro.plate("prompts", len(prompts), subsample_size=size) as batch:
            if batch is not None and len(batch) < len(prompts):
                (prompts,), columns = self.some_prompts(batch, prompts, **columns)
            distribution = self.prior(prompts, **self.prior_settings)
            x = pyro.sample("completion", distribution)
            if self.power != 1.0:
                log_p = distribution.log_prob(x)
                pyro.factor("power", (self.power - 1.0) * log_p.masked_fill(log_p == -math.inf, 0.0))
            if self.reward is None:
                return
            factor("reward", self.scores(self.reward, distribution, prompts, x, columns).to(x.device), self.beta)

    @staticmethod
    def scores(
        reward: Reward, distribution: Autoregressive, prompts: Sequence[Prompt], x: Tensor, columns: Mapping[str, Any]
    ) -> Tensor:
        """Return a reward of completions (*, prompt, token), with all arguments that a reward may have.

        :param distribution: of the completions, given the prompts.
        :param columns: of the prompts.
        """
        tokens = on_host(x)
        every = tokens.expand(broadcast_shape(x.shape[:-1], distribution.batch_shape) + x.shape[-1:])
        cut = distribution.truncated(every).numpy()
        arguments = with_trainer_arguments(columns, distribution.lm.token_ids(every), cut)
        return reward(prompts, distribution.decode(tokens), **arguments)


def _some(name: str, column: Any, batch: Tensor, size: int) -> Any:
    """Return the values of a column of ``size`` prompts for a batch of them.

    :raises ValueError: if the column has not one value a prompt.
    """
    if isinstance(column, (str, bytes, Mapping)) or not hasattr(column, "__len__"):
        return column  # the reward takes or refuses it
    is_array = isinstance(column, (Tensor, np.ndarray))
    length = (column.shape[-1] if column.ndim else 1) if is_array else len(column)
    if length != size:
        raise ValueError(f"column {name!r} has {length} values for {size} prompts")
    return column[..., batch.cpu()] if is_array else [column[i] for i in batch.tolist()]
