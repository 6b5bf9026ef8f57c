r"""The distribution of a trajectory, for Pyro.

    p(\tau) = p(s_0) \prod_t \pi(a_t | s_t) P(s_{t+1} | s_t, a_t),      t < \tau's end, at most the horizon

A trajectory is a tensor of its actions, rewards and observations, from which its return and its score under any policy
follow without playing it again. `log_prob` is that of the actions,

    log p(\tau)  =  \sum_t log \pi(a_t | s_t),

a density with respect to the environment's dynamics, which are the same under every policy and cancel wherever two
distributions of trajectories are compared (Levine 2018, arXiv 1805.00909).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot

from bayeslm.models.lm import categorical
from bayeslm.validation import Count, Shape, validated

from .environments import Environment, Episodes
from .policies import Policy

ACTION, REWARD, OBSERVATION = 0, 1, 2  # columns of a step; the observation has all columns from OBSERVATION on


Steps = Annotated[Tensor, Shape("..., step, 2 + observation")]


@validated
def actions(trajectory: Steps) -> Tensor:
    """Return the actions of trajectories (*, horizon, 2 + observation_size), (*, horizon) int64, -1 after the end."""
    return trajectory[..., ACTION].long()


@validated
def step_rewards(trajectory: Steps) -> Tensor:
    """Return the reward of each step, (*, horizon), 0 after the end."""
    return trajectory[..., REWARD]


@validated
def observations(trajectory: Steps) -> Tensor:
    """Return the observation before each action, (*, horizon, observation_size), 0 after the end."""
    return trajectory[..., OBSERVATION:]


@validated
def returns(trajectory: Steps) -> Tensor:
    """Return the sum of each trajectory's rewards, (*)."""
    return step_rewards(trajectory).sum(-1)


@validated
def by_step(x: Annotated[Tensor, Shape("..., batch, horizon")]) -> Tensor:
    """Move the steps of x, (*, batch, horizon), to the dimension of a plate of steps outside the innermost plate.

    The result is (*, horizon, batch). Where x has further batch dimensions, the third from the right is 1, because the
    trajectory's site is not in the plate of steps; the horizon takes its place.
    """
    x = x if x.dim() > 2 else x[None]
    return x.transpose(-1, -3).squeeze(-1)


@validated
class Trajectory(TorchDistribution):
    """The distribution of a policy's episodes.

    ``event_shape`` is ``(horizon, 2 + observation_size)``, float32: the action, -1 after the end; the reward; and the
    observation before the action. An episode ends where the environment ends it, or after ``horizon`` actions.

    :param environment: see `environments`.
    :param policy: see `policies`; frozen where it is a prior.
    :param horizon: largest number of actions.
    :param starts: the first state of each episode, int64 of any shape, as in `Environment.play`; None is one episode
        with a random start.
    :raises ValueError: if ``horizon`` < 1.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, environment: Environment, policy: Policy, horizon: Count, starts: Tensor | None = None) -> None:
        self.environment = environment
        self.policy = policy
        self.horizon = horizon
        self.starts = torch.tensor(-1) if starts is None else torch.as_tensor(starts)
        event = Size([horizon, OBSERVATION + environment.observation_size])
        super().__init__(self.starts.shape, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Trajectory:
        return Trajectory(self.environment, self.policy, self.horizon, self.starts.expand(Size(batch_shape)))

    def with_policy(self, policy: Policy) -> Trajectory:
        """Return the distribution of another policy's episodes from the same starts."""
        return Trajectory(self.environment, policy, self.horizon, self.starts)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        return _WellFormedTrajectory(self.environment.num_actions)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Play episodes, (*sample_shape, *batch_shape, horizon, 2 + observation_size)."""
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            rollout = Rollout(self, self.environment.play(self.starts.expand(shape).reshape(-1)))
            while not rollout.done:
                rollout.append(*categorical(rollout.logits))
        return rollout.values.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(actions | observations), (*batch); -inf for a malformed trajectory."""
        return self.token_log_prob(value).sum(-1)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Return log pi(a_t | s_t), (*batch, horizon); 0 after the end, -inf where malformed.

        :raises ValueError: if ``value`` has the shape of another horizon or environment.
        """
        if value.shape[-2:] != self.event_shape:
            raise ValueError(f"expected trajectories {tuple(self.event_shape)}, got shape {tuple(value.shape)}")
        action = actions(value)
        live = action >= 0
        steps = torch.arange(self.horizon, device=value.device).expand(action.shape)
        log_pi = self.policy(observations(value)[live], steps[live]).float().log_softmax(-1)
        chosen = log_pi.gather(-1, action[live].clamp_max(log_pi.shape[-1] - 1)[:, None]).squeeze(-1)
        scores = chosen.new_zeros(action.shape)
        scores[live] = chosen
        scores = scores.masked_fill(~_is_well_formed(value, self.environment.num_actions), -torch.inf)
        return scores.expand((*torch.broadcast_shapes(scores.shape[:-1], self.batch_shape), self.horizon))

    def token_log_prob_and_hidden(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return `token_log_prob` without gradient, and features for a critic before each action.

        The features, (*batch, horizon, width), are the observation (one-hot where discrete), the elapsed fraction of
        the horizon, and the return so far.
        """
        with torch.no_grad():
            scores = self.token_log_prob(value)
            value = value.expand(scores.shape[:-1] + self.event_shape)
            features, states = observations(value), self.environment.num_states
            if states is not None:
                features = one_hot(features[..., 0].long(), states).float()
            elapsed = torch.linspace(0, 1, self.horizon + 1, device=value.device)[:-1, None]
            earned = step_rewards(value).cumsum(-1) - step_rewards(value)
            features = torch.cat([features, elapsed.expand(*features.shape[:-1], 1), earned[..., None]], -1)
        return scores, features

    def lengths(self, value: Tensor) -> Tensor:
        """Return the number of actions of each episode, (*batch)."""
        return (actions(value) >= 0).sum(-1)

    def rollout(self) -> Rollout:
        """Begin an episode for every element of the batch, to be played action by action by a particle method."""
        return Rollout(self, self.environment.play(self.starts.reshape(-1), copies=True))


class Rollout:
    """Unfinished trajectories, one per row, played action by action.

    ``values`` (row, horizon, 2 + observation_size) holds the steps so far, ``scores`` (row, horizon) the
    log-probabilities of their actions, ``finished`` (row,) whether an episode has ended, ``t`` the number of steps.
    """

    def __init__(self, distribution: Trajectory, episodes: Episodes) -> None:
        self.distribution = distribution
        self.t = 0
        self.episodes = episodes
        self.finished = episodes.ended
        shape = (len(self.finished), distribution.horizon)
        self.values = torch.zeros(*shape, distribution.event_shape[-1], device=self.finished.device)
        self.values[..., ACTION] = -1.0
        self.scores = torch.zeros(shape, device=self.finished.device)

    @property
    def done(self) -> bool:
        return self.t == self.distribution.horizon or self.idle == 1.0

    @property
    def idle(self) -> float:
        """The fraction of rows that have ended."""
        return float(self.finished.float().mean()) if len(self.finished) else 1.0

    @property
    def logits(self) -> Tensor:
        """Float32 logits (row, action) of the next action."""
        observation = self.episodes.observations
        steps = torch.full(observation.shape[:1], self.t, device=observation.device)
        return self.distribution.policy(observation, steps).float()

    def append(self, token: Tensor, score: Tensor) -> None:
        """Take actions (row,) with their log-probabilities (row,); rows that have ended do not change."""
        ended = self.finished
        step = self.values[:, self.t]
        step[:, ACTION] = torch.where(ended, -1, token)
        step[:, OBSERVATION:] = self.episodes.observations.masked_fill(ended[:, None], 0.0)
        self.scores[:, self.t] = score.masked_fill(ended, 0.0)
        step[:, REWARD] = self.episodes.step(token)
        self.finished = ended | self.episodes.ended
        self.t += 1

    def select(self, rows: Tensor) -> None:
        """Replace each row i by row ``rows[i]``."""
        self.episodes.select(rows)
        self.values, self.scores, self.finished = self.values[rows], self.scores[rows], self.finished[rows]


def _is_well_formed(value: Tensor, num_actions: int) -> Tensor:
    """Return, for each step, whether its action is valid: a number of an action, or -1 from the first -1 on."""
    action = value[..., ACTION]
    ended = (action == -1).long().cumsum(-1) > 0
    exists = (action >= 0) & (action < num_actions) & (action == action.round())
    return torch.where(ended, action == -1, exists)


class _WellFormedTrajectory(constraints.Constraint):
    """Trajectories of valid actions, see `_is_well_formed`."""

    is_discrete = True
    event_dim = 2

    def __init__(self, num_actions: int) -> None:
        self._num_actions = num_actions
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return _is_well_formed(value, self._num_actions).all(-1)
