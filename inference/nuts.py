r"""The No-U-Turn Sampler, Pyro's own, for programs whose latents are all continuous.

Hamiltonian Monte Carlo whose trajectories end where they turn back (Hoffman and Gelman 2014, arXiv 1111.4246), the
next point being drawn from the trajectory by its density (Betancourt 2017, arXiv 1701.02434). It moves over real
numbers z, each latent being x = f(z) with f the bijection onto its support:

    U(z) = -log p(f(z), y) - log |det f'(z)|
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from bayeslm.inference.markov import Potential, ScoredOnce, score, starting_point, unconstrained_shapes
from bayeslm.inference.program import (
    Particles,
    Program,
    SoFar,
    Stopwatch,
    check_counts,
    draw,
    inspect,
    keeping,
    posterior,
    seeded,
)
from bayeslm.posterior import Posterior
from bayeslm.progress import Report, track

STARTS = 100  # points tried, for one that the posterior allows


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
                stats=watch.stats() | stats | {"interrupted": interrupted},
                prior=prior,
            )

    @property
    def _size(self) -> int | None:
        return self.batch_size if self.vectorize else 1

    def _chains(
        self, program: Program, shapes: dict[str, torch.Size], scored: ScoredOnce
    ) -> tuple[list[Particles], dict[str, Any], bool]:
        """Return the draws of each chain, its figures, and whether Ctrl-C interrupted them.

        :raises RunError: if a later chain fails; it carries the finished chains.
        """
        parts: list[Particles] = []
        figures: list[dict[str, float]] = []
        draws: list[dict[str, Tensor]] = []

        def so_far() -> SoFar | None:
            """The finished chains or, if there are none, the draws of the first."""
            if not parts and draws:
                parts.append(self._score(program, scored, _stack(draws)))
            return SoFar(particles=Particles.concatenate(parts)) if parts else None

        steps = self.num_chains * (self.warmup + self.num_samples)
        with track("NUTS", steps, self.progress) as report, keeping(so_far) as run:
            for _ in range(self.num_chains):
                draws.clear()
                figures.append({})
                z = self._start(program, shapes, scored)
                self._walk(Potential(program, scored), z, draws, figures[-1], report)
                parts.append(self._score(program, scored, _stack(draws)))
        return parts, _columns(figures[: len(parts)]), run.interrupted

    def _start(self, program: Program, shapes: dict[str, torch.Size], scored: ScoredOnce) -> dict[str, Tensor]:
        """A point of U(-2, 2) that the posterior allows, the first of `STARTS`."""
        like = {site.name: site.value for site in program.latents}
        z = {name: torch.empty((STARTS, *shapes[name])).uniform_(-2, 2).to(like[name]) for name in shapes}
        return starting_point(program, scored, z, batch_size=self.batch_size, vectorize=self.vectorize)

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
        return score(program, scored, z, batch_size=self.batch_size, vectorize=self.vectorize)[0]


def _stack(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([z[name] for z in draws]) for name in draws[0]}


def _columns(seen: list[dict[str, float]]) -> dict[str, Any]:
    """Figures of chains, (chain,)."""
    return {name: np.array([figures[name] for figures in seen]) for name in seen[0]}
