"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""

from .environments import GymEnvironment, TabularEnvironment
from .mdp import MDP
from .policies import TabularPolicy, UniformPolicy
from .program import Control, PolicyGuide
from .trajectory import Trajectory, actions, observations, returns, step_rewards

__all__ = [
    "MDP",
    "Control",
    "GymEnvironment",
    "PolicyGuide",
    "TabularEnvironment",
    "TabularPolicy",
    "Trajectory",
    "UniformPolicy",
    "actions",
    "observations",
    "returns",
    "step_rewards",
]
