"""Sequential Monte Carlo: populations of weighted particles, resampling, retained draws, and twists."""

from .constraint_guide import ConstraintGuide, constraint_of, with_factor
from .constraints import ConstraintTwist, TokenConstraint
from .first_draws import Chains, FirstDraws, draw_first, number_of_first
from .population import Population, WeightUpdate, groups_of
from .power import Power, PowerTwist
from .proposals import TokenProposal
from .refusals import LearnedRejection, learned_evidence
from .resampling import RESAMPLING, Resampling
from .retained import check_retained, put_first, retained_particles, retained_values
from .twist_learning import TwistLearning
from .twists import LearnedTwist, PolicyTwist, PrefixTwist, SiteRows, SiteTwist

__all__ = [
    "RESAMPLING",
    "Chains",
    "ConstraintGuide",
    "ConstraintTwist",
    "FirstDraws",
    "LearnedRejection",
    "LearnedTwist",
    "PolicyTwist",
    "Population",
    "Power",
    "PowerTwist",
    "PrefixTwist",
    "Resampling",
    "SiteRows",
    "SiteTwist",
    "TokenConstraint",
    "TokenProposal",
    "TwistLearning",
    "WeightUpdate",
    "check_retained",
    "constraint_of",
    "draw_first",
    "groups_of",
    "learned_evidence",
    "number_of_first",
    "put_first",
    "retained_particles",
    "retained_values",
    "with_factor",
]
