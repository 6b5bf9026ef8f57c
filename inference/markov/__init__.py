"""Markov moves, chains of particles, parallel tempering, potentials, and the kernel for Pyro's own MCMC."""

from .chains import Tally, as_draws, chain_by_chain, latent_moves, sweep
from .ensemble import Recycling, num_candidates
from .moves import Move, RandomWalk
from .potential import Potential, ScoreOnce, score_unconstrained, starting_point, unconstrained_shapes
from .suffix_kernel import SuffixKernel
from .suffix_move import SuffixMove
from .tempering import Replicas, tempered

__all__ = [
    "Move",
    "Potential",
    "RandomWalk",
    "Recycling",
    "Replicas",
    "ScoreOnce",
    "SuffixKernel",
    "SuffixMove",
    "Tally",
    "as_draws",
    "chain_by_chain",
    "latent_moves",
    "num_candidates",
    "score_unconstrained",
    "starting_point",
    "sweep",
    "tempered",
    "unconstrained_shapes",
]
