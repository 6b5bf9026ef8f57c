r"""Controlled sequential Monte Carlo: planning with copies of the environment, by a policy that is improved in sweeps.

Particles are episodes. In each sweep they act by a policy q, are weighted with the values V and Q of the plan, and are
resampled, which copies environments. At each step t,

    a_t ~ q_t( . | s_t),    s_{t+1} and r_t from the environment,    w  <-  w  p(a_t | s_t) / q_t(a_t | s_t)  g_t

    dynamics="tilted":    g_t = \exp((r_t + V_{t+1}(s_{t+1}) - V_t(s_t)) / \beta)
    dynamics="fixed":     g_t = \exp((Q_t(s_t, a_t) - V_t(s_t)) / \beta)

and at the end the product of all g_t is replaced by the likelihood exp(return / \beta). After each sweep Q, V and their
policy q are computed anew, backwards from V_T = 0, from the frequencies of all transitions so far
(`SoftValueIteration`). (Heng, Bishop, Deligiannidis and Doucet 2020, Controlled sequential Monte Carlo, arXiv
1708.08396; Guarniero, Johansen and Lee 2017, The iterated auxiliary particle filter, arXiv 1511.06286. Planning as SMC:
Piche, Thomas, Ibrahim, Bengio and Pal 2019, Probabilistic planning with sequential Monte Carlo.)

E[\hat Z] = Z for any V and q, because those of the last sweep do not depend on its particles. With *tilted* dynamics,
the exact V and no defensive share, every weight would be Z. With *fixed* dynamics particles are weighted by their
actions only, because Q averages over next states: a lucky next state is not resampled as if it had been chosen, and
the policy is the best one rather than the optimistic one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslm.inference.program import (
    Particles,
    Program,
    ProgramError,
    inspect,
    posterior,
    running,
    score_values,
)
from bayeslm.inference.sequential import Population, Resampling, WeightUpdate
from bayeslm.models.control import MDP, Control, TabularPolicy, Trajectory, step_rewards
from bayeslm.models.lm import categorical, log_softmax_at
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import Count, Seed, Share, validated

from .soft_value_iteration import Dynamics, SoftValueIteration, SoftValues


@validated
@dataclass(frozen=True)
class ControlledSMC:
    """Plan a `Control` program in an environment of discrete states, and sample its posterior.

    :param num_sweeps: number of sweeps. The plan learns from all of them; the particles are those of the last.
    :param num_particles: number of particles in each chain.
    :param num_chains: number of independent chains, each resampled on its own; all of them inform the same plan.
    :param dynamics: "tilted" plans with the policy of the posterior, "fixed" with the best policy; see
        `SoftValueIteration`.
    :param defensive: share of the prior in q, in [0, 1]: actions to which the plan gives little probability are tried
        too, and weights stay bounded (Hesterberg 1995).
    :param resampling: "systematic", "stratified", "residual" or "multinomial".
    :param ess_threshold: resample where the effective sample size is below this share of the particles; 0 never
        resamples, 1 resamples at every step.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_sweeps: Count = 5
    num_particles: Count = 256
    num_chains: Count = 1
    dynamics: Dynamics = "tilted"
    defensive: Share = 0.1
    resampling: Resampling = "systematic"
    ess_threshold: Share = 0.5
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Control, /, *args: Any, **kwargs: Any) -> Posterior:
        """Plan ``model(*args, **kwargs)`` and sample its posterior.

        The posterior's ``policy`` is the plan's policy after all sweeps, a `TabularPolicy` (T, S, A). Its ``stats`` are
        ``ess_by_step`` (chain, step, prompt) before resampling, ``resampled`` (chain, step, prompt), ``ancestors``
        (chain, step, draw, prompt), and ``environment_steps``, the number of steps taken in all sweeps. The program's
        horizon should not exceed the environment's own time limit.

        :raises ProgramError: if the model is no `Control`, or its states are not discrete.
        """
        if not isinstance(model, Control) or model.environment.num_states is None:
            raise ProgramError(
                "ControlledSMC needs a Control program whose environment has discrete states; use SVI with a neural "
                "policy for other observations, and ImportanceSampling for other programs"
            )
        with running(self.seed) as watch:
            program = inspect(model, *args, **kwargs)
            trajectory = model.trajectory(model.prior, *args, **kwargs)
            transitions = _TransitionCounts(model)
            with track("controlled SMC", self.num_sweeps, self.progress) as report:
                for _ in range(self.num_sweeps):
                    plan = self._plan(model, transitions)
                    population, values = self._sweep(program, model, trajectory, plan, transitions)
                    report()
            particles = self._weigh(program, population, values)
            return posterior(
                program,
                particles,
                engine="ControlledSMC",
                kind="particles",
                num_chains=self.num_chains,
                log_weights=population.total_log_weights,
                roots=population.roots,
                stats=watch.stats() | Population.stats([population]) | {"environment_steps": transitions.total},
                policy=TabularPolicy(self._plan(model, transitions).policy.log().clamp_min(-50.0)),
            )

    def _plan(self, model: Control, transitions: _TransitionCounts) -> SoftValues:
        """Return the soft values and the policy of the process that the transitions so far estimate."""
        solver = SoftValueIteration(model.beta, model.horizon, self.dynamics)
        return solver.run(transitions.mdp(), transitions.prior.double())

    @torch.no_grad()
    def _sweep(
        self,
        program: Program,
        model: Control,
        trajectory: Trajectory,
        plan: SoftValues,
        transitions: _TransitionCounts,
    ) -> tuple[Population, Tensor]:
        """Play and resample particles by the plan, and count their transitions.

        :returns: the weighted population, and the trajectories (particle, prompt, T, 2 + observation_size).
        """
        size, prompts = self.num_chains * self.num_particles, len(trajectory.starts)
        population = Population(program, self)
        mixture = torch.lerp(plan.policy.float(), transitions.prior, self.defensive)
        rollout = trajectory.with_policy(TabularPolicy(mixture.log())).expand((size, prompts)).rollout()
        values = (plan.values / model.beta).float()
        advantages = ((plan.action_values - plan.values[:-1, :, None]) / model.beta).float()

        def state_values() -> Tensor:
            """Return V / beta of the episodes' current states, 0 where they have ended, (row,)."""
            state = rollout.episodes.observations[:, 0].long()
            return torch.where(rollout.finished, 0.0, values[rollout.t, state])

        tilted = self.dynamics == "tilted"
        log_g = torch.zeros(size * prompts, device=trajectory.environment.device)  # sum of log g_t, plus V_0 / beta
        if tilted:
            log_g = state_values()
            population.weigh(log_g.reshape(size, prompts), WeightUpdate("the beginning", {}, {}))
        while not rollout.done:
            state, ended = rollout.episodes.observations, rollout.finished
            before, step = state_values(), rollout.t
            token, log_q = categorical(rollout.logits)
            log_p = log_softmax_at(model.prior(state, torch.full_like(token, step)).float(), token)
            rollout.append(token, log_q)
            reward = step_rewards(rollout.values)[:, step]
            next_state = rollout.episodes.observations
            transitions.add(*(x[~ended] for x in (state, token, reward, next_state)))
            advantage = advantages[step, state[:, 0].long(), token]
            gain = reward / model.beta + state_values() - before if tilted else advantage
            gain = gain.masked_fill(ended, 0.0)
            log_g = log_g + gain
            increment = (log_p - log_q).masked_fill(ended, 0.0) + gain
            population.weigh(increment.reshape(size, prompts), WeightUpdate(f"step {rollout.t}", {}, {}))
            if not rollout.done and (index := population.resample()) is not None:
                rows = (index * prompts + torch.arange(prompts, device=index.device)).reshape(-1)
                rollout.select(rows)
                log_g = log_g[rows]
        population.weigh(-log_g.reshape(size, prompts), WeightUpdate("the end", {}, {}))
        return population, rollout.values.reshape(size, prompts, *trajectory.event_shape)

    def _weigh(self, program: Program, population: Population, values: Tensor) -> Particles:
        """Run the program with these trajectories, and multiply the weights by its factors."""
        particles = score_values(program, {"trajectory": values})
        population.weigh_terms(particles.log_likelihood, "the end of the program")
        return particles


class _TransitionCounts:
    """The number of transitions (s, a, s') so far, and the sum of their rewards."""

    def __init__(self, model: Control) -> None:
        environment = model.environment
        assert environment.num_states is not None
        self._shape = (environment.num_states, environment.num_actions, environment.num_states)
        size = self._shape[0] * self._shape[1] * self._shape[2]
        self._counts, self._rewards = torch.zeros(2, size, dtype=torch.float64, device=environment.device)
        states = torch.arange(self._shape[0], device=environment.device)
        with torch.no_grad():
            logits = [model.prior(states[:, None].float(), torch.full_like(states, t)) for t in range(model.horizon)]
        self.prior: Tensor = torch.stack(logits).float().softmax(-1)
        """Probabilities of the prior policy, (T, S, A)."""

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def add(self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor) -> None:
        """Count transitions from states (row, 1) by actions (row,) with rewards (row,) to next states (row, 1)."""
        cell = (states[:, 0].long() * self._shape[1] + actions) * self._shape[2] + next_states[:, 0].long()
        self._counts.index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
        self._rewards.index_add_(0, cell, rewards.double())

    def mdp(self) -> MDP:
        """Return the process with these frequencies and mean rewards.

        An action that was not tried in a state leads back to that state without reward. So does every action in a
        terminal state, in which none is ever taken.
        """
        counts, rewards = self._counts.reshape(self._shape), self._rewards.reshape(self._shape)
        visits = counts.sum(-1, keepdim=True)
        loops = torch.eye(self._shape[0], dtype=torch.float64, device=counts.device)[:, None]
        transitions = torch.where(visits > 0, counts / visits.clamp_min(1.0), loops)
        initial = torch.full((self._shape[0],), 1 / self._shape[0], dtype=torch.float64, device=counts.device)
        return MDP(transitions, rewards / counts.clamp_min(1.0), torch.zeros_like(initial, dtype=torch.bool), initial)
