"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

from .mdp import MDP

__all__ = ["MDP"]
