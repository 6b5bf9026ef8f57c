"""Control: exact and sampling planners, learning in unknown worlds, and strategies of exploration."""

from .controlled_smc import ControlledSMC
from .exploration import Boltzmann, EpsilonGreedy, Exploration, Random, Thompson
from .psrl import PSRL, Belief, EpisodicTask, Learning, Task
from .soft_value_iteration import SoftValueIteration, SoftValues
from .state_values import StateValues

__all__ = [
    "PSRL",
    "Belief",
    "Boltzmann",
    "ControlledSMC",
    "EpisodicTask",
    "EpsilonGreedy",
    "Exploration",
    "Learning",
    "Random",
    "SoftValueIteration",
    "SoftValues",
    "StateValues",
    "Task",
    "Thompson",
]
