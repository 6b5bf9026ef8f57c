r"""Soft value iteration: control as inference, solved exactly for a finite process and a finite horizon.

A prior policy p(a | s) and the factor exp(return / \beta) define two problems (Levine 2018, arXiv 1805.00909). Both
are solved by one recursion backwards from V_T = 0, and differ in the dynamics of the environment:

    V_t(s) = \beta log E_{a ~ p(. | s)}[ exp(Q_t(s, a) / \beta) ],    \pi_t(a | s) = p(a | s) exp((Q_t - V_t) / \beta)

    dynamics="fixed":    Q_t(s, a) = E_{s'}[ r + \gamma V_{t+1}(s') ]
    dynamics="tilted":   Q_t(s, a) = \beta log E_{s'}[ exp((r + V_{t+1}(s')) / \beta) ]

*Fixed* (section 3) is variational: of all policies under the true dynamics, \pi maximises E[return] - \beta KL(\pi ||
p), and V_0 / \beta is the largest ELBO. *Tilted* (section 2) is the posterior over trajectories, which tilts the
dynamics too: V_0 / \beta is log Z, which importance sampling and SMC estimate, and \pi is optimistic. log Z is never
below the ELBO; where the environment is deterministic they are equal.

As \beta -> 0 the fixed recursion becomes value iteration, and ``beta`` may be 0. A discount \gamma is the probability
that the episode continues after a step. A batch of processes of one size is solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayeslm.models.control import MDP
from bayeslm.validation import Count, NonNegative, Share, validated

Dynamics = Literal["fixed", "tilted"]


@validated
@dataclass(frozen=True)
class SoftValues:
    r"""The solution by `SoftValueIteration`, in units of reward; T is the horizon.

    :param values: V_t(s), (T + 1, *batch, S) float64; the last row is 0.
    :param action_values: Q_t(s, a), (T, *batch, S, A) float64.
    :param policy: \pi_t(a | s), (T, *batch, S, A) float64.
    """

    values: Tensor
    action_values: Tensor
    policy: Tensor


@validated
@dataclass(frozen=True)
class SoftValueIteration:
    r"""Dynamic programming over a finite horizon.

    :param beta: the KL coefficient, in units of reward; 0 is value iteration, where best actions that tie keep the
        ratio of their prior probabilities.
    :param horizon: T, number of actions in an episode.
    :param dynamics: "fixed" for the best policy, "tilted" for the posterior over trajectories, as described above.
    :param discount: \gamma in [0, 1]; below 1 with fixed dynamics only.
    :raises ValueError: if a setting is out of range.
    """

    beta: NonNegative
    horizon: Count
    dynamics: Dynamics = "fixed"
    discount: Share = 1.0

    def __post_init__(self) -> None:
        if self.dynamics == "tilted" and (self.beta == 0 or self.discount < 1):
            raise ValueError(
                f"SoftValueIteration: tilted dynamics need beta > 0 and discount 1, got {self.beta} and {self.discount}"
            )

    @validated
    def run(self, mdp: MDP, prior: Tensor | None = None) -> SoftValues:
        """Solve a process.

        :param prior: p(a | s), (*batch, S, A), or one for each step (T, *batch, S, A); uniform by default.
        :raises ValueError: if ``prior`` has another shape, or dynamics are tilted and the process is `MDP.mixed`.
        """
        if self.dynamics == "tilted" and mdp.mixed:
            raise ValueError(
                "SoftValueIteration: tilted dynamics need the distribution of the reward, but this process has only "
                'means (MDP.mixed); use dynamics="fixed", or separate states for outcomes with different rewards'
            )
        prior = self._prior_of_each_step(mdp, prior)
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
        r"""Return the soft values of a policy, E[return] - \beta KL(\pi || p) from each state on.

        :param policy: \pi(a | s), (*batch, S, A), or one for each step (T, *batch, S, A).
        :param prior: p(a | s), in either shape; uniform by default.
        :returns: (T + 1, *batch, S) float64, nowhere above the values of `run` with fixed dynamics.
        :raises ValueError: if dynamics are tilted, or ``policy`` or ``prior`` has another shape.
        """
        if self.dynamics != "fixed":
            raise ValueError(f'SoftValueIteration: a policy is evaluated under dynamics="fixed", not {self.dynamics!r}')
        prior, policy = self._prior_of_each_step(mdp, prior), self._expand(mdp, "policy", policy)
        values = [torch.zeros_like(mdp.initial)]
        for t in reversed(range(self.horizon)):
            value = self._value(prior[t], policy[t], self._action_values(mdp, values[-1]))
            values.append(value.masked_fill(mdp.terminal, 0.0))  # no action is taken there, so the KL is 0
        return torch.stack(values[::-1])

    def _action_values(self, mdp: MDP, value: Tensor) -> Tensor:
        """Return Q_t, (*batch, S, A), from V_{t+1}, (*batch, S)."""
        if self.dynamics == "fixed":
            return mdp.expected_rewards + self.discount * (mdp.transitions @ value[..., None, :, None]).squeeze(-1)
        return self.beta * (mdp.transitions.log() + (mdp.rewards + value[..., None, None, :]) / self.beta).logsumexp(-1)

    def _improve(self, prior: Tensor, q: Tensor) -> Tensor:
        """Return the best policy for Q_t, both (*batch, S, A)."""
        if self.beta > 0:
            return (prior.log() + q / self.beta).softmax(-1)
        allowed = q.masked_fill(prior == 0, -torch.inf)
        best = prior * (allowed == allowed.amax(-1, keepdim=True))
        return best / best.sum(-1, keepdim=True)

    def _value(self, prior: Tensor, policy: Tensor, q: Tensor) -> Tensor:
        r"""Return V_t(s) = E_\pi[Q_t] - \beta KL(\pi || p), (*batch, S); for the best policy it is the log-mean-exp."""
        value = (policy * q).sum(-1)
        if self.beta > 0:
            value = value - self.beta * (torch.xlogy(policy, policy) - torch.xlogy(policy, prior)).sum(-1)
        return value

    def _prior_of_each_step(self, mdp: MDP, prior: Tensor | None) -> Tensor:
        """Return the prior policy of each step, (T, *batch, S, A) float64."""
        uniform = torch.full_like(mdp.expected_rewards, 1 / mdp.num_actions)
        return self._expand(mdp, "prior", uniform if prior is None else prior)

    def _expand(self, mdp: MDP, name: str, policy: Tensor) -> Tensor:
        """Expand a policy (*batch, S, A) or (T, *batch, S, A) to (T, *batch, S, A) float64."""
        shape = (self.horizon, *mdp.expected_rewards.shape)
        if tuple(policy.shape) not in (shape, shape[1:]):
            raise ValueError(f"SoftValueIteration: {name} must be {shape[1:]} or {shape}, got {tuple(policy.shape)}")
        return policy.to(mdp.initial).expand(shape)
