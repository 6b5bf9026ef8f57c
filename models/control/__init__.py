"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

import importlib.util

from .environments import GymEnvironment, TabularEnvironment
from .mdp import MDP
from .policies import CountdownPolicy, MLPPolicy, TabularPolicy, TrainablePolicy, UniformPolicy
from .program import Control, PolicyGuide
from .trajectory import Trajectory, actions, by_step, observations, returns, step_rewards

__all__ = [
    "MDP",
    "Control",
    "CountdownPolicy",
    "GymEnvironment",
    "MLPPolicy",
    "PolicyGuide",
    "TabularEnvironment",
    "TabularPolicy",
    "TrainablePolicy",
    "Trajectory",
    "UniformPolicy",
    "actions",
    "by_step",
    "observations",
    "returns",
    "step_rewards",
]

if importlib.util.find_spec("gymnasium") is not None:  # an extra, without which the rest is of use
    import gymnasium

    gymnasium.register("bayeslm/Token-v0", entry_point="bayeslm.models.control.token_env:TokenEnv")
