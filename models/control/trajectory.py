r"""The law of a trajectory, as a Pyro distribution.

    p(\tau) = p(s_0) \prod_t \pi(a_t | s_t) P(s_{t+1} | s_t, a_t),      t < \tau's end, at most the horizon

A trajectory is a value: it holds its actions, rewards and observations, so whoever has it can score it under any policy
and read its return without playing it again. `log_prob` is that of the actions,

    log p(\tau)  =  \sum_t log \pi(a_t | s_t),

a density with respect to the environment's own law: the dynamics are the same in the prior and in every policy, and
cancel wherever two laws are compared (Levine 2018, arXiv 1805.00909).
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot

from bayeslm.models.lm import categorical

from .environments import Environment, Episodes
from .policies import Policy

ACTION, REWARD, OBSERVATION = 0, 1, 2  # columns of a step; observations are all from there on


def actions(trajectory: Tensor) -> Tensor:
    """(*, horizon) int64, -1 after the end, of trajectories (*, horizon, 2 + observation_size)."""
    return trajectory[..., ACTION].long()


def step_rewards(trajectory: Tensor) -> Tensor:
    """(*, horizon), 0 after the end."""
    return trajectory[..., REWARD]


def observations(trajectory: Tensor) -> Tensor:
    """(*, horizon, observation_size): what was seen before each action, 0 after the end."""
    return trajectory[..., OBSERVATION:]


def returns(trajectory: Tensor) -> Tensor:
    """(*): the sum of rewards."""
    return step_rewards(trajectory).sum(-1)


def by_step(x: Tensor) -> Tensor:
    """What is of each step, (*, batch, horizon), as a plate of steps around the innermost plate has it: (*, horizon,
    batch).

    With more plates further out, a trajectory's own dimension in the plate of steps is 1: the horizon takes its place.
    """
    x = x if x.dim() > 2 else x[None]
    return x.transpose(-1, -3).squeeze(-1)


class Trajectory(TorchDistribution):
    """Episodes of a policy.

    ``event_shape`` is ``(horizon, 2 + observation_size)``, float32: the action, -1 after the end; the reward; and the
    observation that the action was chosen by. An episode ends where the environment says so, or after ``horizon``
    actions.

    :param environment: see `environments`.
    :param policy: see `policies`; frozen where it is a prior.
    :param horizon: the most actions.
    :param starts: where each episode of the batch begins, int64 of any shape, as the environment counts; None is one
        episode, that begins where chance will have it.
    :raises ValueError: if ``horizon`` < 1.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, environment: Environment, policy: Policy, horizon: int, starts: Tensor | None = None) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.environment = environment
        self.policy = policy
        self.horizon = horizon
        self.starts = torch.tensor(-1) if starts is None else torch.as_tensor(starts)
        event = Size([horizon, OBSERVATION + environment.observation_size])
        super().__init__(self.starts.shape, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Trajectory:
        return Trajectory(self.environment, self.policy, self.horizon, self.starts.expand(Size(batch_shape)))

    def with_policy(self, policy: Policy) -> Trajectory:
        """The same episodes of another policy."""
        return Trajectory(self.environment, policy, self.horizon, self.starts)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        return _WellFormed(self.environment.num_actions)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Play: (*sample_shape, *batch_shape, horizon, 2 + observation_size)."""
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            rollout = Rollout(self, self.environment.play(self.starts.expand(shape).reshape(-1)))
            while not rollout.done:
                rollout.append(*categorical(rollout.logits))
        return rollout.values.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(actions | observations), shape of the batch; -inf if malformed."""
        return self.token_log_prob(value).sum(-1)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """log pi(a_t | s_t), shape (*batch, horizon); 0 after the end, -inf where malformed.

        :raises ValueError: for trajectories of another horizon or environment.
        """
        if value.shape[-2:] != self.event_shape:
            raise ValueError(f"expected trajectories {tuple(self.event_shape)}, got shape {tuple(value.shape)}")
        action = actions(value)
        played = action >= 0
        steps = torch.arange(self.horizon, device=value.device).expand(action.shape)
        log_pi = self.policy(observations(value)[played], steps[played]).float().log_softmax(-1)
        chosen = log_pi.gather(-1, action[played].clamp_max(log_pi.shape[-1] - 1)[:, None]).squeeze(-1)
        scores = chosen.new_zeros(action.shape)
        scores[played] = chosen
        scores = scores.masked_fill(~_is_well_formed(value, self.environment.num_actions), -torch.inf)
        return scores.expand((*torch.broadcast_shapes(scores.shape[:-1], self.batch_shape), self.horizon))

    def token_log_prob_and_hidden(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`token_log_prob` without gradient, and what a critic may know before each action, (*batch, horizon, width):
        the observation (one-hot where discrete), the share of the horizon that is gone, and the return so far."""
        with torch.no_grad():
            scores = self.token_log_prob(value)
            value = value.expand(scores.shape[:-1] + self.event_shape)
            seen, states = observations(value), self.environment.num_states
            if states is not None:
                seen = one_hot(seen[..., 0].long(), states).float()
            gone = torch.linspace(0, 1, self.horizon + 1, device=value.device)[:-1, None]
            so_far = step_rewards(value).cumsum(-1) - step_rewards(value)
            known = torch.cat([seen, gone.expand(*seen.shape[:-1], 1), so_far[..., None]], -1)
        return scores, known

    def lengths(self, value: Tensor) -> Tensor:
        """Actions of each episode; shape of the batch."""
        return (actions(value) >= 0).sum(-1)

    def steps(self) -> Rollout:
        """Episodes of every element of the batch, to be played action by action (particle methods do)."""
        return Rollout(self, self.environment.play(self.starts.reshape(-1), copies=True))


class Rollout:
    """Unfinished trajectories, one a row, played action by action.

    ``values`` (row, horizon, 2 + observation_size) holds the steps so far, ``scores`` (row, horizon) their
    log-probabilities under the law, ``finished`` (row,) says which have ended, ``t`` counts the steps.
    """

    def __init__(self, law: Trajectory, episodes: Episodes) -> None:
        self.law = law
        self.t = 0
        self.episodes = episodes
        self.finished = episodes.ended
        shape = (len(self.finished), law.horizon)
        self.values = torch.zeros(*shape, law.event_shape[-1], device=self.finished.device)
        self.values[..., ACTION] = -1.0
        self.scores = torch.zeros(shape, device=self.finished.device)

    @property
    def done(self) -> bool:
        return self.t == self.law.horizon or self.idle == 1.0

    @property
    def idle(self) -> float:
        """The share of rows that have ended."""
        return float(self.finished.float().mean()) if len(self.finished) else 1.0

    @property
    def logits(self) -> Tensor:
        """Float32 logits (row, action) of the next action."""
        seen = self.episodes.observations
        return self.law.policy(seen, torch.full(seen.shape[:1], self.t, device=seen.device)).float()

    def append(self, token: Tensor, score: Tensor) -> None:
        """Take actions (row,) with their log-probabilities (row,); rows that have ended stay as they are."""
        over = self.finished
        step = self.values[:, self.t]
        step[:, ACTION] = torch.where(over, -1, token)
        step[:, OBSERVATION:] = self.episodes.observations.masked_fill(over[:, None], 0.0)
        self.scores[:, self.t] = score.masked_fill(over, 0.0)
        step[:, REWARD] = self.episodes.step(token)
        self.finished = over | self.episodes.ended
        self.t += 1

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is."""
        self.episodes.select(rows)
        self.values, self.scores, self.finished = self.values[rows], self.scores[rows], self.finished[rows]


def _is_well_formed(value: Tensor, num_actions: int) -> Tensor:
    """Per step: an action that there is, or -1 from the first -1 on."""
    action = value[..., ACTION]
    over = (action == -1).long().cumsum(-1) > 0
    exists = (action >= 0) & (action < num_actions) & (action == action.round())
    return torch.where(over, action == -1, exists)


class _WellFormed(constraints.Constraint):
    """Trajectories whose actions exist, and stop at the end."""

    is_discrete = True
    event_dim = 2

    def __init__(self, num_actions: int) -> None:
        self._num_actions = num_actions
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return _is_well_formed(value, self._num_actions).all(-1)
