r"""Soft value iteration: control as inference, solved exactly for a finite process and a finite horizon.

A policy's prior p(a | s) and the factor exp(return / \beta) define two problems (Levine 2018, arXiv 1805.00909). Both
are solved by one recursion backwards from V_T = 0, and differ in what chance may do:

    V_t(s) = \beta log E_{a ~ p(. | s)}[ exp(Q_t(s, a) / \beta) ],    \pi_t(a | s) = p(a | s) exp((Q_t - V_t) / \beta)

    dynamics="fixed":    Q_t(s, a) = E_{s'}[ r + \gamma V_{t+1}(s') ]
    dynamics="tilted":   Q_t(s, a) = \beta log E_{s'}[ exp((r + V_{t+1}(s')) / \beta) ]

*Fixed* (section 3) is variational: of all policies in the world as it is, \pi maximises E[return] - \beta KL(\pi || p),
and V_0 / \beta is the highest ELBO. *Tilted* (section 2) is the posterior over trajectories itself, in which chance
turns out well, too: V_0 / \beta is log Z, which importance sampling and SMC estimate, and \pi is an optimist's. It is
never below the ELBO; where the environment is deterministic they agree.

As \beta -> 0 the fixed recursion is value iteration, and ``beta`` may be 0. A discount \gamma is the probability of
living on. Many processes of one size are solved at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeslm.inference.program import check_counts
from bayeslm.models.control.mdp import MDP


@dataclass(frozen=True)
class SoftValues:
    """What `SoftValueIteration` finds, in units of reward; T is the horizon."""

    values: Tensor
    """(T + 1, *, S) float64: V_t(s), the last row 0."""
    action_values: Tensor
    """(T, *, S, A) float64: Q_t(s, a)."""
    policy: Tensor
    """(T, *, S, A) float64: \\pi_t(a | s)."""


@dataclass(frozen=True)
class SoftValueIteration:
    """Dynamic programming over a finite horizon.

    :param beta: temperature of the likelihood; 0 for value iteration, where actions of equal value share the prior's
        probability.
    :param horizon: T, the number of actions in an episode.
    :param dynamics: "fixed", the best policy; "tilted", the posterior over trajectories. See the top of the file.
    :param discount: probability of living on after a step. Below 1 with fixed dynamics only.
    """

    beta: float
    horizon: int
    dynamics: str = "fixed"
    discount: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "horizon")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"SoftValueIteration: beta must be 0 or positive, and finite, got {self.beta}")
        if self.dynamics not in ("fixed", "tilted"):
            raise ValueError(f'SoftValueIteration: dynamics must be "fixed" or "tilted", got {self.dynamics!r}')
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"SoftValueIteration: discount must be in [0, 1], got {self.discount}")
        if self.dynamics == "tilted" and (self.beta == 0 or self.discount < 1):
            raise ValueError("SoftValueIteration: tilted dynamics need a positive beta and no discount")

    def run(self, mdp: MDP, prior: Tensor | None = None) -> SoftValues:
        """Solve a process.

        :param prior: (*, S, A), p(a | s), or one of each step (T, *, S, A); uniform by default.
        :raises ValueError: if it has another shape; or if dynamics are tilted, and the process has mean rewards alone.
        """
        if self.dynamics == "tilted" and mdp.mixed:
            raise ValueError(
                "SoftValueIteration: tilted dynamics need the law of the reward, and this process has means of rewards "
                'that vary (MDP.mixed): use dynamics="fixed", or give outcomes that pay differently states of their own'
            )
        prior = self._prior(mdp, prior)
        value = torch.zeros_like(mdp.initial)
        values, action_values, policies = [value], [], []
        for t in reversed(range(self.horizon)):
            q = self._action_values(mdp, value)
            policy = self._improve(prior[t], q)
            value = self._value(prior[t], policy, q)
            values.append(value)
            action_values.append(q)
            policies.append(policy)
        return SoftValues(*(torch.stack(rows[::-1]) for rows in (values, action_values, policies)))

    def evaluate(self, mdp: MDP, policy: Tensor, prior: Tensor | None = None) -> Tensor:
        r"""A policy's own values, E[return] - \beta KL(\pi || p) from each state on, in the world as it is.

        :param policy, prior: (*, S, A), or one of each step (T, *, S, A); the prior is uniform by default.
        :return: (T + 1, *, S) float64, nowhere above `run`'s with fixed dynamics.
        :raises ValueError: if dynamics are tilted, or one of them has another shape.
        """
        if self.dynamics != "fixed":
            raise ValueError('SoftValueIteration: policies are judged in the world as it is: dynamics="fixed"')
        prior, policy = self._prior(mdp, prior), self._of_each_step(mdp, "policy", policy)
        values = [torch.zeros_like(mdp.initial)]
        for t in reversed(range(self.horizon)):
            value = self._value(prior[t], policy[t], self._action_values(mdp, values[-1]))
            values.append(value.masked_fill(mdp.terminal, 0.0))  # nobody acts there, whatever the policy would do
        return torch.stack(values[::-1])

    def _action_values(self, mdp: MDP, value: Tensor) -> Tensor:
        """Q_t (*, S, A) of V_{t+1} (*, S)."""
        if self.dynamics == "fixed":
            return mdp.expected_rewards + self.discount * (mdp.transitions @ value[..., None, :, None]).squeeze(-1)
        return self.beta * (mdp.transitions.log() + (mdp.rewards + value[..., None, None, :]) / self.beta).logsumexp(-1)

    def _improve(self, prior: Tensor, q: Tensor) -> Tensor:
        """The policy (*, S, A) that is best by Q_t (*, S, A)."""
        if self.beta > 0:
            return (prior.log() + q / self.beta).softmax(-1)
        allowed = q.masked_fill(prior == 0, -torch.inf)
        best = prior * (allowed == allowed.amax(-1, keepdim=True))
        return best / best.sum(-1, keepdim=True)

    def _value(self, prior: Tensor, policy: Tensor, q: Tensor) -> Tensor:
        r"""V_t(s) = E_\pi[Q_t] - \beta KL(\pi || p), which for the best policy is the log-mean-exp."""
        value = (policy * q).sum(-1)
        if self.beta > 0:
            value = value - self.beta * (torch.xlogy(policy, policy) - torch.xlogy(policy, prior)).sum(-1)
        return value

    def _prior(self, mdp: MDP, prior: Tensor | None) -> Tensor:
        """The prior policy of each step, (T, *, S, A) float64."""
        uniform = torch.full_like(mdp.expected_rewards, 1 / mdp.num_actions)
        return self._of_each_step(mdp, "prior", uniform if prior is None else prior)

    def _of_each_step(self, mdp: MDP, name: str, policy: Tensor) -> Tensor:
        """A policy (*, S, A) or (T, *, S, A) as (T, *, S, A) float64."""
        shape = (self.horizon, *mdp.expected_rewards.shape)
        if tuple(policy.shape) not in (shape, shape[1:]):
            raise ValueError(f"SoftValueIteration: {name} must be {shape[1:]} or {shape}, got {tuple(policy.shape)}")
        return policy.to(mdp.initial).expand(shape)
