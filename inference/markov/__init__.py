"""Markov moves, chains of particles, parallel tempering, potentials, and the kernel for Pyro's own MCMC."""

from .chains import Tally, as_draws, chain_by_chain, sweep
from .moves import Move, RandomWalk, latent_moves
from .potential import Potential, ScoreOnce, score_unconstrained, starting_point, unconstrained_shapes
from .suffix_kernel import SuffixKernel
from .tempering import Replicas, tempered

__all__ = [
    "Move",
    "Potential",
    "RandomWalk",
    "Replicas",
    "ScoreOnce",
    "SuffixKernel",
    "Tally",
    "as_draws",
    "chain_by_chain",
    "latent_moves",
    "score_unconstrained",
    "starting_point",
    "sweep",
    "tempered",
    "unconstrained_shapes",
]
