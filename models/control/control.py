r"""The ready-made program of control as inference (Levine 2018, arXiv 1805.00909):

    \tau ~ p(\tau | prior policy),      factor exp(\sum_t r_t / \beta)

Its *posterior*, which `ImportanceSampling` and `SMC` sample, tilts all of a trajectory, what chance does too: log Z =
log E_p[exp(return / \beta)]. Its *best policy*, which `SVI` looks for, can only choose actions, and maximises the ELBO

    E_q[return] / \beta - KL(q || p)      over q(\tau) = p(s_0) \prod_t \pi(a_t | s_t) P(s_{t+1} | s_t, a_t)

They are one where the environment is deterministic. `SoftValueIteration` has both, exactly, for tables.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from .environments import Environment
from .policies import Policy, UniformPolicy
from .trajectory import Trajectory, by_step, returns, step_rewards


class Control:
    """A Pyro program: ``trajectory`` ~ prior policy, ``score`` = its return, ``reward`` = factor r_t / beta a step.

    The factor stands in a plate ``steps``, which tells engines what each action has earned; ``pyro.factor("return",
    returns(trajectory) / beta)`` is the same posterior without that.

    :param environment: see `environments`.
    :param beta: temperature of the likelihood, in units of reward; small is sharp.
    :param horizon: the most actions of an episode.
    :param prior: the prior policy; uniform by default.
    :raises ValueError: if ``beta`` is not positive and finite.
    """

    def __init__(self, environment: Environment, beta: float, horizon: int, prior: Policy | None = None) -> None:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be positive and finite, got {beta}")
        self.environment = environment
        self.beta = beta
        self.horizon = horizon
        self.prior = UniformPolicy(environment.num_actions) if prior is None else prior

    def law(self, policy: Policy, starts: Tensor | None = None) -> Trajectory:
        """Episodes of a policy, one a start; one, begun by chance, without starts."""
        starts = torch.tensor([-1]) if starts is None else torch.as_tensor(starts).reshape(-1)
        return Trajectory(self.environment, policy, self.horizon, starts)

    def __call__(self, starts: Tensor | None = None) -> None:
        """Run the program, with a prompt for each of ``starts``, int64; without, one whose start is chance."""
        law = self.law(self.prior, starts)
        with pyro.plate("prompts", len(law.starts)):
            trajectory = pyro.sample("trajectory", law)
            pyro.deterministic("score", returns(trajectory), event_dim=0)
            with pyro.plate("steps", self.horizon):
                pyro.factor("reward", by_step(step_rewards(trajectory)) / self.beta)

    def guide(self, policy: nn.Module) -> PolicyGuide:
        """A Pyro guide of the program, for `SVI` to train and others to propose by."""
        return PolicyGuide(self, policy)


class PolicyGuide(nn.Module):
    """The program with another policy in place of the prior."""

    def __init__(self, control: Control, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self._control = control

    def forward(self, *args: Any, **kwargs: Any) -> None:
        store = pyro.get_param_store()
        for name, own in self.policy.named_parameters():
            kept = f"policy$$${name}"  # Pyro's name for it
            if kept in store and store[kept] is not own:
                del store[kept]  # another policy's, trained before, which Pyro would train in place of this one's
        pyro.module("policy", self.policy)
        law = self._control.law(self.policy, *args, **kwargs)
        with pyro.plate("prompts", len(law.starts)):
            pyro.sample("trajectory", law)
