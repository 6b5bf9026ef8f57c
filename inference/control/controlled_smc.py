r"""Controlled sequential Monte Carlo: planning with copies of the environment, by a plan that particles improve.

Particles act by a plan q, are weighed by what the plan expects, and resampled, which copies environments. At each t,

    a_t ~ q_t( . | s_t),    s_{t+1} and r_t from the environment,    w  <-  w  p(a_t | s_t) / q_t(a_t | s_t)  g_t

    dynamics="tilted":    g_t = \exp((r_t + V_{t+1}(s_{t+1}) - V_t(s_t)) / \beta)
    dynamics="fixed":     g_t = \exp((Q_t(s_t, a_t) - V_t(s_t)) / \beta)

and at the end the product of g gives way to the truth, exp(return / \beta). After each such sweep, all transitions seen
so far teach Q and V, backwards from V_T = 0 (`SoftValueIteration`, on their frequencies), and q, the policy of these
values; the next sweep is a better one. (Heng, Bishop, Deligiannidis and Doucet 2020, Controlled sequential Monte
Carlo, arXiv 1708.08396; Guarniero, Johansen and Lee 2017, The iterated auxiliary particle filter, arXiv 1511.06286.
Planning as SMC is Piche, Thomas, Ibrahim, Bengio and Pal 2019, Probabilistic planning with sequential Monte Carlo.)

E[\hat Z] = Z whatever V and q, since the last sweep's come from those before. *Tilted*, with the exact V and no
defensive share, every weight would be Z. *Fixed*, particles are weighed by their actions alone, for Q is the mean over
what chance does: good luck is not resampled as if it had been chosen, and the policy is the best one, no optimist's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayeslm.inference.program import (
    Assign,
    Particles,
    Program,
    ProgramError,
    Stopwatch,
    check_counts,
    inspect,
    posterior,
    run_particles,
    seeded,
)
from bayeslm.inference.sequential import Islands, Step, check_resampling
from bayeslm.models.control.control import Control
from bayeslm.models.control.mdp import MDP
from bayeslm.models.control.policies import TabularPolicy
from bayeslm.models.control.trajectory import REWARD, Trajectory
from bayeslm.models.lm.decoding import categorical
from bayeslm.models.lm.network import log_softmax_at
from bayeslm.posterior import Posterior
from bayeslm.progress import track

from .soft_value_iteration import SoftValueIteration, SoftValues


@dataclass(frozen=True)
class ControlledSMC:
    """A plan for a `Control` program in an environment of discrete states, and particles of its posterior.

    :param num_sweeps: of which the last gives the particles, and all teach.
    :param num_particles: in each chain.
    :param num_chains: islands, each resampled within itself; all of them teach the same plan.
    :param dynamics: "tilted", the plan is the posterior's; "fixed", it is the best policy's. See `SoftValueIteration`.
    :param defensive: the share of the prior in q: actions that the plan thinks little of are tried, too, and weights
        stay bounded (Hesterberg 1995).
    :param resampling, ess_threshold: as in `SMC`.
    :param seed, progress: as in `ImportanceSampling`.
    """

    num_sweeps: int = 5
    num_particles: int = 256
    num_chains: int = 1
    dynamics: str = "tilted"
    defensive: float = 0.1
    resampling: str = "systematic"
    ess_threshold: float = 0.5
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_sweeps", "num_particles", "num_chains")
        check_resampling(self)
        if not 0.0 <= self.defensive <= 1.0:
            raise ValueError(f"ControlledSMC: defensive must be in [0, 1], got {self.defensive}")
        SoftValueIteration(1.0, 1, self.dynamics)  # which says what it may be

    def run(self, model: Control, /, *args: Any, **kwargs: Any) -> Posterior:
        """Plan ``model(*args, **kwargs)``. ``policy`` is the plan (T, S, A) after all sweeps, ``stats`` as `SMC`'s, and
        ``environment_steps``.

        The horizon should not exceed a time limit of the environment's own.

        :raises ProgramError: if the model is no `Control`, or its states are not discrete.
        """
        if not isinstance(model, Control) or model.environment.num_states is None:
            raise ProgramError(
                "ControlledSMC plans a Control program whose environment has discrete states; use SVI with a policy of "
                "your own for other observations, and ImportanceSampling for other programs"
            )
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            law = model.law(model.prior, *args, **kwargs)
            seen = _Transitions(model)
            with track("controlled SMC", self.num_sweeps, self.progress) as report:
                for _ in range(self.num_sweeps):
                    plan = self._plan(model, seen)
                    islands, values = self._sweep(program, model, law, plan, seen)
                    report()
            particles = self._weigh(program, islands, values)
            return posterior(
                program,
                particles,
                engine="ControlledSMC",
                kind="particles",
                num_chains=self.num_chains,
                log_weights=islands.total,
                roots=islands.roots,
                stats=watch.read() | Islands.record([islands]) | {"environment_steps": seen.total},
                policy=TabularPolicy(self._plan(model, seen).policy.log().clamp_min(-50.0)),
            )

    def _plan(self, model: Control, seen: _Transitions) -> SoftValues:
        """V and the policy, by what has been seen."""
        return SoftValueIteration(model.beta, model.horizon, self.dynamics).run(seen.mdp(), seen.prior.double())

    @torch.no_grad()
    def _sweep(
        self, program: Program, model: Control, law: Trajectory, plan: SoftValues, seen: _Transitions
    ) -> tuple[Islands, Tensor]:
        """Particles that act by the plan, weighed by it: their weights, and trajectories (particle, prompt, T, ...)."""
        size, prompts = self.num_chains * self.num_particles, len(law.starts)
        islands = Islands(
            program,
            self.num_chains,
            self.num_particles,
            scheme=self.resampling,
            threshold=self.ess_threshold,
            alone=True,
        )
        mixture = torch.lerp(plan.policy.float(), seen.prior, self.defensive)
        rollout = law.with_policy(TabularPolicy(mixture.log())).expand((size, prompts)).steps()
        values = (plan.values / model.beta).float()
        advantages = ((plan.action_values - plan.values[:-1, :, None]) / model.beta).float()

        def expected() -> Tensor:
            """V / beta of where the episodes are, 0 where they have ended."""
            state = rollout.episodes.observations[:, 0].long()
            return torch.where(rollout.finished, 0.0, values[rollout.t, state])

        tilted = self.dynamics == "tilted"
        gained = torch.zeros(size * prompts, device=law.environment.device)  # log of the product of g, and V_0
        if tilted:
            gained = expected()
            islands.weigh(gained.reshape(size, prompts), Step("the beginning", {}, {}, None))
        while not rollout.done:
            state, over = rollout.episodes.observations, rollout.finished
            before, step = expected(), rollout.t
            token, log_q = categorical(rollout.logits)
            log_p = log_softmax_at(model.prior(state, torch.full_like(token, step)).float(), token)
            rollout.append(token, log_q)
            reward = rollout.values[:, step, REWARD]
            seen.note(*(x[~over] for x in (state, token, reward, rollout.episodes.observations)))
            gain = reward / model.beta + expected() - before if tilted else advantages[step, state[:, 0].long(), token]
            gain = gain.masked_fill(over, 0.0)
            gained = gained + gain
            increment = (log_p - log_q).masked_fill(over, 0.0) + gain
            islands.weigh(increment.reshape(size, prompts), Step(f"step {rollout.t}", {}, {}, None))
            if not rollout.done and (index := islands.resample()) is not None:
                rows = (index * prompts + torch.arange(prompts, device=index.device)).reshape(-1)
                rollout.select(rows)
                gained = gained[rows]
        islands.weigh(-gained.reshape(size, prompts), Step("the end", {}, {}, None))
        return islands, rollout.values.reshape(size, prompts, *law.event_shape)

    def _weigh(self, program: Program, islands: Islands, values: Tensor) -> Particles:
        """Run the program at the trajectories, and weigh by its factors."""
        parts = []
        for some in values.split(program.max_particles):
            with Assign(program, {"trajectory": some}):
                parts.append(run_particles(program, None, len(some)))
        particles = Particles.concatenate(parts)
        islands.weigh_terms(particles.log_likelihood, "the end of the program")
        return particles


class _Transitions:
    """How often each (s, a, s') was seen, and with what rewards."""

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
        """(T, S, A)"""

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def note(self, seen: Tensor, actions: Tensor, rewards: Tensor, following: Tensor) -> None:
        """Add transitions, from observations (row, 1) by actions (row,) to others (row, 1)."""
        cell = (seen[:, 0].long() * self._shape[1] + actions) * self._shape[2] + following[:, 0].long()
        self._counts.index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
        self._rewards.index_add_(0, cell, rewards.double())

    def mdp(self) -> MDP:
        """The process that these frequencies are of.

        What nobody has tried does nothing, which is what happens at an end, where nobody acts.
        """
        counts, rewards = self._counts.reshape(self._shape), self._rewards.reshape(self._shape)
        visits = counts.sum(-1, keepdim=True)
        nothing = torch.eye(self._shape[0], dtype=torch.float64, device=counts.device)[:, None]
        transitions = torch.where(visits > 0, counts / visits.clamp_min(1.0), nothing)
        initial = torch.full((self._shape[0],), 1 / self._shape[0], dtype=torch.float64, device=counts.device)
        return MDP(transitions, rewards / counts.clamp_min(1.0), torch.zeros_like(initial, dtype=torch.bool), initial)
