r"""The No-U-Turn Sampler, Pyro's own, for programs whose latents are all continuous.

Hamiltonian Monte Carlo whose trajectories end where they turn back (Hoffman and Gelman 2014, arXiv 1111.4246), the
next point being drawn from the trajectory by its density (Betancourt 2017, arXiv 1701.02434). It moves over real
numbers z, each latent being x = f(z) with f the bijection onto its support:

    U(z) = -log p(f(z), y) - log |det f'(z)|
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from pyro.ops.integrator import potential_grad
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from bayeslm.posterior import Posterior

from ..models import Autoregressive
from ..models.progress import Report, track
from .checks import check_counts
from .particles import Particles
from .program import Program, ProgramError, inspect, run_particles, same_law, sample_sites, seeded
from .results import Stopwatch, carry, check_evidence, draw, posterior, prompt_labels, to_numpy

STARTS = 100  # points tried, for one that the posterior allows


class Unconstrained(Messenger):
    """Gives continuous latents the values that real numbers stand for.

    A support may depend on latents before it: the bijection is that of the site as the program reaches it.

    :param z: real numbers by site, shaped as the site's values (but for the event, where the bijection changes it).
    """

    def __init__(self, z: dict[str, Tensor]) -> None:
        super().__init__()
        self._z = z
        self.log_det: Tensor | float = 0.0
        """log |det f'(z)|, summed over all sites, once the program has run."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self._z or msg["value"] is not None:
            return
        z = self._z[msg["name"]]
        to_support = biject_to(msg["fn"].support)
        msg["value"] = to_support(z)
        self.log_det = self.log_det + to_support.log_abs_det_jacobian(z, msg["value"]).sum()


class ScoredOnce(Messenger):
    """Scores a completion that has a value once, and again only where its value, its prompts or its network change.

    Between these log p of it is a constant: no network runs at a leapfrog, and no gradient goes through one.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._seen = program  # its completions as last scored

    def _pyro_sample(self, msg: Any) -> None:
        name, law, value = msg["name"], msg["fn"], msg["value"]
        if value is None or not isinstance(law, Autoregressive):
            return
        site = self._seen.sites[name]
        if not (same_law(self._seen, name, law) and torch.equal(site.value, value)):
            site = replace(site, fn=law, value=value)
            self._seen = replace(self._seen, sites=self._seen.sites | {name: site})
        with torch.no_grad():
            score = site.fn.log_prob(site.value)  # which a law keeps of the value it scored last
        msg["fn"] = dist.Delta(value.expand(law.shape()), score.expand(law.batch_shape), event_dim=1)


class Potential:
    """U(z) of a program, a scalar that can be differentiated: what Pyro's NUTS walks on.

    :raises ProgramError: where a run of the program has other latents than ``z``.
    """

    def __init__(self, program: Program, scored: ScoredOnce) -> None:
        self._program = program
        self._scored = scored

    def __call__(self, z: dict[str, Tensor]) -> Tensor:
        with self._scored, Unconstrained(z) as at:
            trace = poutine.trace(self._program.model).get_trace(*self._program.args, **self._program.kwargs)
        trace = prune_subsample_sites(trace)
        latents = {name for name, node in sample_sites(trace) if not node["is_observed"]}
        if latents != z.keys():
            raise ProgramError(f"the program's latents changed between runs: {sorted(latents)}, first {sorted(z)}")
        return -torch.as_tensor(trace.log_prob_sum() + at.log_det)


def unconstrained_shapes(program: Program) -> dict[str, torch.Size]:
    """The shape of the real numbers z of every latent.

    :raises ProgramError: if a latent is not continuous.
    """
    shapes = {}
    for site in program.latents:
        if site.is_completion:
            raise ProgramError(
                f"site {site.name!r} is a completion, and NUTS moves continuous latents alone: observe it (obs=...), "
                "or use MCMC, which redraws its suffixes"
            )
        if site.fn.support.is_discrete:
            raise ProgramError(
                f"site {site.name!r} is discrete, and NUTS moves continuous latents alone: observe it, or use MCMC"
            )
        try:
            shapes[site.name] = biject_to(site.fn.support).inv(site.value).shape
        except NotImplementedError as error:
            raise ProgramError(f"site {site.name!r}: no bijection from real numbers onto {site.fn.support}") from error
    return shapes


@dataclass(frozen=True)
class NUTS:
    """Chains of Pyro's No-U-Turn Sampler, one after the other.

    All latents of all prompts are one state, and one trajectory moves them together: prompts that are posteriors of
    their own stay so, and share the length and the step size of trajectories. Completions can be observed
    (``pyro.sample("x", lm(prompts), obs=tokens)``); their networks run once, not at each step.

    :param num_samples: draws of each chain, after ``warmup`` steps that adapt step size and mass matrix.
    :param num_chains: chains, from starting points of their own.
    :param target_accept: the mean acceptance that the step size is adapted to; higher is slower, with fewer
        divergences.
    :param max_tree_depth: trajectories have at most 2 ** max_tree_depth steps.
    :param batch_size, vectorize, seed, progress: as in `ImportanceSampling`. (A step runs the program at one point;
        the first two concern draws of the prior, and of the posterior when they are scored.)
    """

    num_samples: int = 500
    warmup: int = 500
    num_chains: int = 4
    target_accept: float = 0.8
    max_tree_depth: int = 10
    batch_size: int | None = None
    vectorize: bool = True
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_samples", "warmup", "num_chains", "max_tree_depth", "batch_size")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"NUTS: target_accept must be between 0 and 1, got {self.target_accept}")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``; log Z is not estimated (NaN).

        ``stats``: ``acceptance`` (mean acceptance probability), ``divergences`` (their number) and ``step_size``, one
        a chain. Ctrl-C keeps the chains that are done, or what the first has drawn.

        :raises ProgramError: if a latent is not continuous, or the log-density has no finite gradient.
        :raises EvidenceError: if no starting point has positive probability.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            shapes = unconstrained_shapes(program)
            scored = ScoredOnce(program)
            with scored:
                prior, _ = draw(program, None, self.num_samples, batch_size=self._size, vectorize=self.vectorize)
            parts, stats, interrupted = self._chains(program, shapes, scored)
            particles = Particles.concatenate(parts)
            return posterior(
                program,
                particles,
                engine="NUTS",
                kind="markov",
                num_chains=len(parts),
                stats=watch.read() | stats | {"interrupted": interrupted},
                prior=prior,
            )

    @property
    def _size(self) -> int | None:
        return self.batch_size if self.vectorize else 1

    def _chains(
        self, program: Program, shapes: dict[str, torch.Size], scored: ScoredOnce
    ) -> tuple[list[Particles], dict[str, Any], bool]:
        """Draws of each chain, what was seen in each, and whether Ctrl-C cut them short.

        An exception carries the chains done before it as ``error.particles``.
        """
        parts: list[Particles] = []
        seen: list[dict[str, float]] = []
        draws: list[dict[str, Tensor]] = []
        with track("NUTS", self.num_chains * (self.warmup + self.num_samples), self.progress) as report:
            for _ in range(self.num_chains):
                draws.clear()
                seen.append({})
                try:
                    z = self._start(program, shapes, scored)
                    self._walk(Potential(program, scored), z, draws, seen[-1], report)
                    parts.append(self._score(program, scored, _stack(draws)))
                except KeyboardInterrupt:
                    if not parts and not draws:
                        raise
                    parts = parts or [self._score(program, scored, _stack(draws))]
                    return parts, _columns(seen[: len(parts)]), True
                except Exception as error:
                    if parts:
                        carry(error, Particles.concatenate(parts), f"the {len(parts)} chains done before")
                    raise
        return parts, _columns(seen), False

    def _start(self, program: Program, shapes: dict[str, torch.Size], scored: ScoredOnce) -> dict[str, Tensor]:
        """A point of U(-2, 2) that the posterior allows, for each prompt by itself where prompts are posteriors.

        :raises EvidenceError: if none of `STARTS` is.
        """
        like = {site.name: site.value for site in program.latents}
        z = {name: torch.empty((STARTS, *shapes[name])).uniform_(-2, 2).to(like[name]) for name in shapes}
        log_joint = self._score(program, scored, z).log_joint
        check_evidence(to_numpy(log_joint)[None], prompt_labels(program))
        first = log_joint.isfinite().long().argmax(0, keepdim=True)  # (1, prompt)
        z = {name: program.take(name, x, first)[0] for name, x in z.items()}
        gradient, _ = potential_grad(Potential(program, scored), z)
        for name, slope in gradient.items():
            if not slope.isfinite().all():
                raise ProgramError(f"the gradient of the log-density along site {name!r} is not finite: NUTS needs one")
        return z

    def _walk(
        self,
        potential: Potential,
        z: dict[str, Tensor],
        draws: list[dict[str, Tensor]],
        seen: dict[str, float],
        report: Report,
    ) -> None:
        """One chain from z: its draws go to ``draws``, its figures to ``seen``."""

        def note(kernel: PyroNUTS, params: dict[str, Tensor], stage: str, step: int) -> None:
            acceptance = float(kernel.logging()["acc. prob"])
            if stage == "Sample":
                draws.append({name: x.detach() for name, x in params.items()})
                divergences = len(kernel.diagnostics()["divergences"])
                seen.update(acceptance=acceptance, divergences=divergences, step_size=kernel.step_size)
            report(values={"acceptance": acceptance, "step size": kernel.step_size})

        kernel = PyroNUTS(
            potential_fn=potential, target_accept_prob=self.target_accept, max_tree_depth=self.max_tree_depth
        )
        PyroMCMC(
            kernel,
            num_samples=self.num_samples,
            warmup_steps=self.warmup,
            initial_params=z,
            transforms={},  # draws are brought back where they are scored
            hook_fn=note,
            disable_progbar=True,
        ).run()

    def _score(self, program: Program, scored: ScoredOnce, z: dict[str, Tensor]) -> Particles:
        """The program run at real numbers (draw, *batch, *event), in batches of bounded memory."""
        draws = len(next(iter(z.values())))
        parts = []
        for rows in torch.arange(draws).split(self._size or program.max_particles):
            at = {name: program.under_plate(name, x[rows]) for name, x in z.items()}
            with scored, Unconstrained(at):
                parts.append(run_particles(program, None, len(rows), vectorize=self.vectorize))
        return Particles.concatenate(parts)


def _stack(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([z[name] for z in draws]) for name in draws[0]}


def _columns(seen: list[dict[str, float]]) -> dict[str, Any]:
    """Figures of chains, (chain,)."""
    return {name: np.array([figures[name] for figures in seen]) for name in seen[0]}
