"""Markov moves, parallel tempering, potentials, and the kernel for Pyro's own MCMC."""

from .moves import Move, RandomWalk, Tally, latent_moves, sweep, tempered
from .potential import Potential, ScoredOnce, score, starting_point, unconstrained_shapes
from .suffix_kernel import SuffixKernel
from .tempering import Replicas

__all__ = [
    "Move",
    "Potential",
    "RandomWalk",
    "Replicas",
    "ScoredOnce",
    "SuffixKernel",
    "Tally",
    "latent_moves",
    "score",
    "starting_point",
    "sweep",
    "tempered",
    "unconstrained_shapes",
]
