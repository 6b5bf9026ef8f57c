"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

import importlib.util

from .bandits import Bandit, BernoulliArms, GaussianArms, Pull
from .control import Control, PolicyGuide
from .environments import GymEnvironment, TabularEnvironment
from .mdp import MDP
from .policies import CountdownPolicy, MLPPolicy, TabularPolicy, TrainablePolicy, UniformPolicy
from .river_swim import river_swim
from .trajectory import Trajectory, actions, by_step, observations, returns, step_rewards
from .worlds import Dirichlet, NormalGamma, Steps, UnknownMDP, Worlds

__all__ = [
    "MDP",
    "Bandit",
    "BernoulliArms",
    "Control",
    "CountdownPolicy",
    "Dirichlet",
    "GaussianArms",
    "GymEnvironment",
    "MLPPolicy",
    "NormalGamma",
    "PolicyGuide",
    "Pull",
    "Steps",
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

if importlib.util.find_spec("gymnasium") is not None:  # an extra, without which the rest is of use
    import gymnasium

    gymnasium.register("bayeslm/Token-v0", entry_point="bayeslm.models.control.token_env:TokenEnv")
