r"""The ready-made program of control as inference (Levine 2018, arXiv 1805.00909).

    \tau ~ p(\tau | prior policy),      factor exp(\sum_t r_t / \beta)

`ImportanceSampling` and `SMC` sample its *posterior*, which tilts all of a trajectory, the environment's chance
included: log Z = log E_p[exp(return / \beta)]. `SVI` looks for its *best policy*, which can choose actions only, and
maximises the ELBO

    E_q[return] / \beta - KL(q || p)      over q(\tau) = p(s_0) \prod_t \pi(a_t | s_t) P(s_{t+1} | s_t, a_t)

The two agree where the environment is deterministic. `SoftValueIteration` computes both exactly for finite processes.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from bayeslm.models.rewards import factor
from bayeslm.validation import Count, Positive, validated

from .environments import Environment
from .policies import Policy, UniformPolicy
from .trajectory import Trajectory, by_step, step_rewards


@validated
class Control:
    """A Pyro program: ``trajectory`` ~ prior policy, ``reward`` = factor r_t / beta per step.

    The factor is inside a plate ``steps``, from which engines learn what each action has earned;
    ``rewards.factor("reward", returns(trajectory), beta)`` has the same posterior, without that information.

    :param environment: see `environments`.
    :param beta: the KL coefficient, in units of reward; a small one makes a sharp posterior.
    :param horizon: largest number of actions in an episode.
    :param prior: the prior policy; uniform by default.
    :raises ValueError: if ``beta`` is not positive and finite.
    """

    stands_alone = True  # engines need not try whether particles of this very class mix

    def __init__(self, environment: Environment, beta: Positive, horizon: Count, prior: Policy | None = None) -> None:
        self.environment = environment
        self.beta = beta
        self.horizon = horizon
        self.prior = UniformPolicy(environment.num_actions) if prior is None else prior

    def trajectory(self, policy: Policy, starts: Tensor | None = None) -> Trajectory:
        """Return the distribution of a policy's episodes.

        :param starts: first states, (prompt,) int64, as in `Environment.play`; None is one episode with a random start.
        """
        starts = torch.tensor([-1]) if starts is None else torch.as_tensor(starts).reshape(-1)
        return Trajectory(self.environment, policy, self.horizon, starts)

    def __call__(self, starts: Tensor | None = None) -> None:
        """Run the program, with one prompt for each of ``starts`` (see `trajectory`)."""
        distribution = self.trajectory(self.prior, starts)
        with pyro.plate("prompts", len(distribution.starts)):
            trajectory = pyro.sample("trajectory", distribution)
            with pyro.plate("steps", self.horizon):
                factor("reward", by_step(step_rewards(trajectory)), self.beta)

    def guide(self, policy: nn.Module) -> ControlGuide:
        """Return a Pyro guide of this program, for `SVI` to train and for other engines as a proposal."""
        return ControlGuide(self, policy)


@validated
class ControlGuide(nn.Module):
    """A guide of `Control`: the same trajectory site, drawn with ``policy`` in place of the prior policy."""

    def __init__(self, control: Control, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self._control = control

    def forward(self, *args: Any, **kwargs: Any) -> None:
        store = pyro.get_param_store()
        for name, own in self.policy.named_parameters():
            stored = f"policy$$${name}"  # the name that `pyro.module` gives it
            if stored in store and store[stored] is not own:
                del store[stored]  # another policy's, from an earlier training: Pyro would train it instead of this one
        pyro.module("policy", self.policy)
        distribution = self._control.trajectory(self.policy, *args, **kwargs)
        with pyro.plate("prompts", len(distribution.starts)):
            pyro.sample("trajectory", distribution)
