"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

import importlib.util

from .bandits import Bandit, BernoulliArms, GaussianArms, Pull
from .control import Control, ControlGuide
from .environments import Environment, Episodes, TabularEnvironment
from .gym_environment import GymEnvironment
from .mdp import MDP, river_swim
from .policies import CountdownPolicy, MLPPolicy, Policy, TabularPolicy, TrainablePolicy, UniformPolicy
from .trajectory import Trajectory, actions, by_step, observations, returns, step_rewards
from .worlds import Dirichlet, Experience, NormalGamma, UnknownMDP, Worlds

__all__ = [
    "MDP",
    "Bandit",
    "BernoulliArms",
    "Control",
    "ControlGuide",
    "CountdownPolicy",
    "Dirichlet",
    "Environment",
    "Episodes",
    "Experience",
    "GaussianArms",
    "GymEnvironment",
    "MLPPolicy",
    "NormalGamma",
    "Policy",
    "Pull",
    "TabularEnvironment",
    "TabularPolicy",
    "TrainablePolicy",
    "Trajectory",
    "UniformPolicy",
    "UnknownMDP",
    "Worlds",
    "actions",
    "by_step",
    "observations",
    "returns",
    "river_swim",
    "step_rewards",
]

if importlib.util.find_spec("gymnasium") is not None:  # an optional dependency
    import gymnasium

    gymnasium.register("bayeslm/Token-v0", entry_point="bayeslm.models.control.token_env:TokenEnv")
