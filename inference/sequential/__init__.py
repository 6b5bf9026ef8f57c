"""Populations of particles, resampling, retained draws, and twists."""

from .population import Islands, Step
from .resampling import RESAMPLING, check_resampling
from .retained import check_retained, in_front, retained_particles, retained_values
from .twist_learning import TwistLearning
from .twists import LearnedTwist, PolicyTwist, PrefixTwist, Rows, SiteTwist, induced

__all__ = [
    "RESAMPLING",
    "Islands",
    "LearnedTwist",
    "PolicyTwist",
    "PrefixTwist",
    "Rows",
    "SiteTwist",
    "Step",
    "TwistLearning",
    "check_resampling",
    "check_retained",
    "in_front",
    "induced",
    "retained_particles",
    "retained_values",
]
