"""Sequential Monte Carlo: populations of weighted particles, resampling, retained draws, and twists."""

from .population import Population, WeightUpdate
from .resampling import RESAMPLING, Resampling
from .retained import check_retained, put_first, retained_particles, retained_values
from .twist_learning import TwistLearning
from .twists import LearnedTwist, PolicyTwist, PrefixTwist, SiteRows, SiteTwist, induced

__all__ = [
    "RESAMPLING",
    "LearnedTwist",
    "PolicyTwist",
    "Population",
    "PrefixTwist",
    "Resampling",
    "SiteRows",
    "SiteTwist",
    "TwistLearning",
    "WeightUpdate",
    "check_retained",
    "induced",
    "put_first",
    "retained_particles",
    "retained_values",
]
