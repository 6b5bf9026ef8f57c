"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

import importlib.util

from .mdp import MDP

__all__ = ["MDP"]

if importlib.util.find_spec("gymnasium") is not None:  # an extra, without which the rest is of use
    import gymnasium

    gymnasium.register("bayeslm/Token-v0", entry_point="bayeslm.models.control.token_env:TokenEnv")
