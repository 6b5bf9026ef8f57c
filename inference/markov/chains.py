"""Markov chains of particles: moves for a program, sweeps of them, their counts, and the draws that are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program, Site, ranks
from bayeslm.models.lm import LanguageModel
from bayeslm.validation import NonEmpty, validated

from .ensemble import Recycling
from .moves import Move, Outcome, PriorMove, RandomWalk
from .suffix_move import SuffixMove


@validated
def latent_moves(
    program: Program,
    *,
    policy: LanguageModel | None = None,
    num_candidates: int = 1,
    step_size: float = 1.0,
    groups: Tensor | None = None,
    same_cut: bool = False,
) -> list[Move]:
    """Return a move for each latent in the program's order: `SuffixMove`, `PriorMove` or `RandomWalk`.

    :param program: the inspected program.
    :param policy: the language model that proposes suffixes of completions; None for the prior.
    :param num_candidates: the number of suffixes that are proposed at once.
    :param step_size: the initial step size of random walks.
    :param groups: the group of each chain, (particle,); the chains of a group adapt together.
    :param same_cut: whether completions of all chains are cut at the same place, see `SuffixMove`.
    :raises ProgramError: if a latent is masked.
    """

    def move(site: Site) -> Move:
        if site.is_completion:
            return SuffixMove(program, site.name, policy, num_candidates, groups, same_cut)
        if site.fn.support.is_discrete:
            return PriorMove(program, site.name)
        return RandomWalk(program, site.name, step_size, groups)

    return [move(site) for site in program.latents]


class Tally:
    """Counts of accepted moves: by site and prompt, and of completions also by the position of the cut."""

    def __init__(self) -> None:
        self._sites: dict[str, Tensor] = {}  # (2, prompt): tried, accepted
        self._cuts: dict[str, Tensor] = {}  # (2, token)

    def add(self, move: Move, outcome: Outcome, rows: Tensor | slice = slice(None)) -> None:
        """Count one move.

        :param rows: the particles that count.
        """
        name, site = move.site.name, move.site
        accepted = outcome.accepted[rows]
        counts = torch.stack([outcome.tried[rows].sum(0), accepted.sum(0)])
        self._sites[name] = counts + self._sites.get(name, 0)
        if outcome.cut is None:
            return
        cut = outcome.cut[rows]
        shape = [len(cut)] + [1] * (cut.dim() - 1)
        if not move.program.shared:
            shape[1 + site.dims.index("prompt")] = accepted.shape[1]
        accepted = accepted.reshape(shape).expand_as(cut)
        length = site.shape[-1]
        tried = (cut[cut >= 0].bincount(minlength=length), cut[(cut >= 0) & accepted].bincount(minlength=length))
        self._cuts[name] = torch.stack(tried) + self._cuts.get(name, 0)

    def stats(self) -> dict[str, np.ndarray]:
        """Return the share of accepted moves, of all processes of the run.

        ``acceptance_<site>`` (prompt,); and of completions ``acceptance_by_cut_<site>`` (max_new_tokens,), the share by
        the number of tokens kept (0, 1, ...; NaN where none was tried), and ``cuts_<site>`` (max_new_tokens,), the
        number tried. The prompt axis has length 1 where prompts share a latent.
        """
        stats = {}
        with np.errstate(invalid="ignore"):
            for name, counts in self._sites.items():
                tried, accepted = ranks().total(counts).cpu().numpy()
                stats[f"acceptance_{name}"] = accepted / tried
            for name, counts in self._cuts.items():
                tried, accepted = ranks().total(counts).cpu().numpy()
                stats |= {f"acceptance_by_cut_{name}": accepted / tried, f"cuts_{name}": tried}
        return stats


def sweep(
    moves: list[Move],
    state: Particles,
    gamma: Tensor | float = 1.0,
    *,
    tally: Tally | None = None,
    recycling: Recycling | None = None,
    rows: Tensor | slice = slice(None),
    adapt: bool = False,
) -> Particles:
    """Make each move in turn, as often as proposes every element of its site once on average.

    :param moves: a move for each latent (`latent_moves`).
    :param state: the chains, one a particle.
    :param gamma: inverse temperatures, broadcast to (particle, prompt).
    :param tally: counts the moves of the particles ``rows``; None counts none.
    :param recycling: averages over the candidates of completions; None keeps none.
    :param rows: the particles that the tally and the averages count.
    :param adapt: whether moves adapt: random walks their step sizes, moves of completions the distribution of cuts.
    :returns: the chains after the sweep.
    """
    for move in moves:
        for _ in range(move.repeats):
            state, outcome = move(state, gamma)
            if tally is not None:
                tally.add(move, outcome, rows)
            if recycling is not None and isinstance(move, SuffixMove):
                recycling.add(move.program, outcome.candidates, outcome.shares, rows)
            if adapt:
                move.adapt(outcome)
    return state


@validated
def as_draws(state: Particles) -> Particles:
    """Return the chains' state on the CPU, without what a posterior does not keep (log-probabilities of tokens)."""
    return replace(
        state,
        values={name: value.cpu() for name, value in state.values.items()},
        log_prior=state.log_prior.cpu(),
        log_proposal=state.log_proposal.cpu(),
        log_likelihood={name: term.cpu() for name, term in state.log_likelihood.items()},
        rewards={name: r.cpu() for name, r in state.rewards.items()},
        token_log_prob={},
        pointwise={name: term.cpu() for name, term in state.pointwise.items()},
        auxiliary={},
        proposal_token_log_prob={},
        log_left_out=None,
    )


@validated
def chain_by_chain(states: Annotated[list[Particles], NonEmpty]) -> Particles:
    """Join the states of all chains, one element a draw, into particles in the order of chains, then of draws."""
    draws, chains = len(states), len(states[0])
    return Particles.concatenate(states)[torch.arange(draws * chains).reshape(draws, chains).T.reshape(-1)]
