r"""The No-U-Turn Sampler of Pyro, for programs whose latents are all continuous.

It is Hamiltonian Monte Carlo whose trajectories end where they turn back (Hoffman and Gelman 2014, arXiv 1111.4246) and
whose next point is drawn from the trajectory by its density (Betancourt 2017, arXiv 1701.02434). Its state is real
numbers z, each latent being x = f(z) with f the bijection onto its support, and its potential is

    U(z) = -log p(f(z), y) - log |det f'(z)|
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from bayeslm.inference.markov import Potential, ScoreOnce, score_unconstrained, starting_point, unconstrained_shapes
from bayeslm.inference.program import (
    Particles,
    Program,
    SoFar,
    draw,
    inspect,
    keeping,
    posterior,
    running,
)
from bayeslm.posterior import Posterior
from bayeslm.progress import Report, track
from bayeslm.validation import Count, Seed, Within, validated

SEEN = ("diverging", "tree_depth", "energy")  # at each draw


@validated
@dataclass(frozen=True)
class NUTS:
    """Chains of Pyro's No-U-Turn Sampler, run one after another.

    The latents of all prompts are one state, and each trajectory moves them together: prompts that are posteriors of
    their own remain independent, but share the length and the step size of trajectories. Completions can be observed
    (``pyro.sample("x", lm(prompts), obs=tokens)``); their networks run once, not at each step.

    :param num_samples: the number of draws of each chain.
    :param warmup: the number of steps before the first draw; they adapt the step size and the mass matrix.
    :param num_chains: the number of chains, each with its own starting point.
    :param target_accept: the mean acceptance to which the step size is adapted; a higher one is slower and has fewer
        divergences.
    :param max_tree_depth: trajectories have at most 2 ** max_tree_depth steps.
    :param batch_size: the number of particles in one run of the program, where it is run for draws of the prior, for
        starting points and for the final scores; None for as many as bounded memory allows. A step runs one particle.
    :param vectorize: whether one of these runs holds all particles of a batch. False runs them one by one, for programs
        whose Python code depends on the value of a latent.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    num_samples: Count = 500
    warmup: Count = 500
    num_chains: Count = 4
    target_accept: Annotated[float, Within("(0, 1)")] = 0.8
    max_tree_depth: Count = 10
    batch_size: Count | None = None
    vectorize: bool = True
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Sample the posterior of ``model(*args, **kwargs)``. Draws are equally weighted; log Z is not estimated (NaN).

        ``stats``: ``acceptance``, the mean probability of acceptance, ``divergences``, their number, and ``step_size``,
        all (chain,); ``interrupted``, ``seconds``, ``tokens`` and ``model_calls``. ``sample_stats`` (chain, draw):
        ``diverging``; ``tree_depth``, the number of doublings of the trajectory; ``energy``, the potential and kinetic
        energy at its start. After Ctrl-C the posterior has the complete chains or, if there are none, the draws of the
        first.

        :raises ProgramError: if a latent is not continuous, or the log-density has no finite gradient.
        :raises EvidenceError: if no starting point has positive probability.
        :raises RunError: if an error stops the run after the first draw; it carries the same draws.
        """
        with running(self.seed) as watch:
            program = inspect(model, *args, **kwargs)
            shapes = unconstrained_shapes(program)
            score_once = ScoreOnce(program)
            with score_once:
                prior, _ = draw(program, None, self.num_samples, **self._batches)
            parts, stats, at_draws, interrupted = self._chains(program, shapes, score_once)
            return posterior(
                program,
                Particles.concatenate(parts),
                engine="NUTS",
                kind="markov",
                num_chains=len(parts),
                stats=watch.stats() | stats | {"interrupted": interrupted},
                sample_stats=at_draws,
                prior=prior,
            )

    @property
    def _batches(self) -> dict[str, Any]:
        """The arguments of functions that run many particles at once."""
        return {"batch_size": self.batch_size if self.vectorize else 1, "vectorize": self.vectorize}

    def _chains(
        self, program: Program, shapes: dict[str, torch.Size], score_once: ScoreOnce
    ) -> tuple[list[Particles], dict[str, Any], dict[str, np.ndarray], bool]:
        """Run the chains.

        :returns: the particles of each chain, their ``stats`` (chain,), their ``sample_stats`` (chain, draw), and
            whether Ctrl-C interrupted them.
        :raises RunError: if an error stops them after the first draw; it carries the complete chains, or the first's
            draws.
        """
        parts: list[Particles] = []
        figures: list[dict[str, float]] = []
        at_draws: list[list[dict[str, float]]] = []
        draws: list[dict[str, Tensor]] = []

        def so_far() -> SoFar | None:
            """Return the complete chains; if there are none, the draws of the first become one."""
            if not parts and draws:
                with contextlib.suppress(Exception):  # a program that has just failed may fail at its draws too
                    parts.append(self._score(program, score_once, _stack(draws)))
            return SoFar(particles=Particles.concatenate(parts)) if parts else None

        steps = self.num_chains * (self.warmup + self.num_samples)
        plan = f"{self.num_chains} chains, {self.warmup} steps of warm-up and {self.num_samples} draws of each"
        with track("NUTS", steps, self.progress, plan=plan) as report, keeping(so_far) as run:
            for _ in range(self.num_chains):
                draws.clear()
                figures.append({})
                at_draws.append([])
                z = starting_point(program, score_once, shapes, zero_first=False, **self._batches)
                self._walk(Potential(program, score_once), z, draws, figures[-1], at_draws[-1], report)
                parts.append(self._score(program, score_once, _stack(draws)))
        names = ("acceptance", "divergences", "step_size")
        stats = {name: np.array([chain[name] for chain in figures[: len(parts)]]) for name in names}
        found = [chain[: len(part)] for chain, part in zip(at_draws, parts, strict=False)]
        return (
            parts,
            stats,
            {name: np.array([[x[name] for x in chain] for chain in found]) for name in SEEN},
            run.interrupted,
        )

    def _walk(
        self,
        potential: Potential,
        z: dict[str, Tensor],
        draws: list[dict[str, Tensor]],
        figures: dict[str, float],
        at_draws: list[dict[str, float]],
        report: Report,
    ) -> None:
        """Run one chain from z.

        Append its draws to ``draws`` and what was seen there to ``at_draws``; set its ``stats`` so far in ``figures``.
        """

        def record(kernel: _Recording, params: dict[str, Tensor], stage: str, step: int) -> None:
            acceptance = float(kernel.logging()["acc. prob"])
            if stage == "Sample":
                divergences = len(kernel.diagnostics()["divergences"])
                # before the draw, so that Ctrl-C between the two leaves no draw without figures
                at_draws.append({name: getattr(kernel, name) for name in SEEN})
                figures.update(acceptance=acceptance, divergences=divergences, step_size=kernel.step_size)
                draws.append({name: x.detach() for name, x in params.items()})
            report(values={"acceptance": acceptance, "step size": kernel.step_size})

        kernel = _Recording(
            potential_fn=potential, target_accept_prob=self.target_accept, max_tree_depth=self.max_tree_depth
        )
        PyroMCMC(
            kernel,
            num_samples=self.num_samples,
            warmup_steps=self.warmup,
            initial_params=z,
            transforms={},  # `_score` maps z to the supports
            hook_fn=record,
            disable_progbar=True,
        ).run()

    def _score(self, program: Program, score_once: ScoreOnce, z: dict[str, Tensor]) -> Particles:
        return score_unconstrained(program, score_once, z, **self._batches)[0]


class _Recording(PyroNUTS):
    """Pyro's NUTS, with what ArviZ shows of its last trajectory: diverging, tree_depth, energy."""

    diverging, tree_depth, energy = False, 0, float("nan")

    def _build_tree(self, *args: Any) -> Any:
        """Double the trajectory; called for a tree's halves too, and last for the tree itself."""
        tree = super()._build_tree(*args)
        depth, energy = args[-2:]
        self.diverging, self.energy = bool(tree.diverging), float(energy)
        self.tree_depth = depth + (not (tree.diverging or tree.turning))
        return tree


def _stack(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack draws (*batch, *event) by site, (draw, *batch, *event)."""
    return {name: torch.stack([z[name] for z in draws]) for name in draws[0]}
