"""Whether the particles of a run stand alone: some of them run once more by themselves, and must have the same scores.

`independence` tries a program at arbitrary values, before anything is drawn. A condition over all particles
(``if (x == t).any()``) that those values do not meet shows on the run's own particles, where it matters. Let f be the
share of particles that have another score in a batch than alone; where f = 0 the batch is right. `UNIFORM` = 4 of them
are chosen at random, so that the batch passes with a probability of at most (1 - f)^4: 6% at f = 1/2, 0.01% at
f = 0.9. Of a mean, a sort or a normalisation f is nearly 1, as of ``any`` for a rare token: all particles without it
differ. Where f is small, others of the chosen help, without a stated probability: of the first two latents the
particles with the smallest and the largest value (of completions the shortest and the longest), which differ from a
majority, and the most likely one, which has the most weight.

The first batch of a run is tried, the 4th, the 16th and so on: conditions may be met only as a policy learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import RememberedScores, repeating

from .handlers import seeded
from .independence import mixing, program_of_guide
from .program import Program
from .trials import agree, assigned, drawn_sites, run_alone, scores_of, together_at, values_of

UNIFORM = 4  # particles that are chosen at random
REPEATS = 3  # of a comparison that fails, to tell particles that are mixed from a program that is random
MIDDLE = 0.05  # the share of particles at each end that do not count for the spread of scores


def check_own_particles(
    program: Program, what: str, trace: Trace, num_particles: int, scores: RememberedScores | None
) -> None:
    """Compare the scores of some particles of a run with those that each has alone, at the same values.

    No network of a completion runs, and no `Reward` is called: it repeats its scores of the run, so one that normalises
    over its batch is not found. Functions that the program calls itself are called for these particles; the random
    state is restored. Sites that have other scores when the same particles run again, because the program is random,
    are not compared; nor is a program that asks whether it is rehearsed, which does something else then.

    :param program: also a guide in its place (`program_of_guide`).
    :param what: program or guide, for the error.
    :param trace: of the run.
    :param scores: what the rewards of the run gave.
    :raises ProgramError: if a site's scores differ.
    """
    with seeded(3), torch.no_grad(), repeating(scores or RememberedScores()) as asked, poutine.block():
        try:
            found = scores_of(program, trace, num_particles)
            chosen = _chosen(program, trace, found, num_particles)
            values = dict(zip(chosen, values_of(program, trace, num_particles, chosen), strict=True))
        except Exception:  # the run meets it too
            return
        middle = {name: _middle(x) for name, x in found.items()}

        def differing(these: dict[str, Tensor], others: dict[str, Tensor]) -> set[str]:
            common = these.keys() & others.keys() & middle.keys()
            return {name for name in common if not agree(these[name], others[name], among=middle[name])}

        different: dict[int, tuple[set[str], dict[str, Tensor]]] = {}
        for i, value in values.items():
            try:
                expected = scores_of(program, run_alone(program, assigned(value)), 1)
            except Exception:  # of one particle, which runs of several do not meet
                continue
            if names := differing({name: x[i : i + 1] for name, x in found.items()}, expected):
                different[i] = names, expected
        if asked or not different:
            return
        names = set.union(*(names for names, _ in different.values()))
        every = values_of(program, trace, num_particles)
        for _ in range(REPEATS):
            try:
                again = scores_of(program, together_at(program, every), num_particles)
                names -= {name for name in names if not agree(again.get(name), found[name], among=middle[name])}
                for i, (_, expected) in different.items():
                    names -= differing(scores_of(program, run_alone(program, assigned(values[i])), 1), expected)
            except Exception:
                return
        for i, (others, expected) in different.items():
            if name := next((name for name in program.sites if name in names & others), None):
                raise mixing(program, what, name, found[name][i : i + 1], expected[name])


def check_own_guide(program: Program, guide: Callable[..., Any], trace: Trace, num_particles: int) -> None:
    """Compare scores of a guide's particles as `check_own_particles` does; not of one that is made of the program.

    :raises ProgramError: if a site's scores differ.
    """
    if getattr(guide, "is_of_program", False):
        return
    with seeded(3), torch.no_grad(), poutine.block():
        inspected = program_of_guide(program, guide)
    if inspected is not None:
        check_own_particles(*inspected[:2], trace, num_particles, None)


def _chosen(program: Program, trace: Trace, found: dict[str, Tensor], num_particles: int) -> list[int]:
    """Return the particles that run alone; the random ones are those of the random state."""
    chosen = torch.randperm(num_particles)[:UNIFORM].tolist()
    for site in drawn_sites(program)[:2]:
        node: Any = trace.nodes[site.name]
        value, size = node["value"], node["value"].double()
        if isinstance(node["fn"], Autoregressive):
            size = node["fn"].lengths(value).double()
        size = size.expand(num_particles, *size.shape[1:]).reshape(num_particles, -1).sum(1)
        chosen += [int(size.argmin()), int(size.argmax())]
    observed = [found[name].double().sum(1).cpu() for name in found if program.sites[name].kind == "observed"]
    likelihood = sum(observed, torch.zeros(num_particles, dtype=torch.double))
    return list(dict.fromkeys([*chosen, int(likelihood.nan_to_num(nan=-torch.inf).argmax())]))


def _middle(scores: Tensor) -> Tensor:
    """Return the scores (particle, ...) without the smallest and largest ones, whose spread hides small differences."""
    some = int(MIDDLE * len(scores))
    return scores.sort(0).values[some : len(scores) - some]
