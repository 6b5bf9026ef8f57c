"""A Pyro program as engines see it: its sites and plates, its particles, and the posterior that they give."""

from .assign import Assign, same_law
from .checks import check_counts, check_positive
from .errors import ProgramError
from .guides import AutoPolicy, PolicyGuide, as_law
from .handlers import PROMPTS, Arbitrary, Epochs
from .partial import History
from .particles import Particles
from .program import PARTICLES, STEPS, Program, Site, in_prompts, inspect, look, sample_sites, seeded
from .random_states import RandomStates
from .results import EvidenceError, Stopwatch, carry, check_evidence, draw, posterior, prompt_labels
from .run import run_particles, site_terms, site_value, token_scores, traces
from .tensors import along, to_numpy

__all__ = [
    "PARTICLES",
    "PROMPTS",
    "STEPS",
    "Arbitrary",
    "Assign",
    "AutoPolicy",
    "Epochs",
    "EvidenceError",
    "History",
    "Particles",
    "PolicyGuide",
    "Program",
    "ProgramError",
    "RandomStates",
    "Site",
    "Stopwatch",
    "along",
    "as_law",
    "carry",
    "check_counts",
    "check_evidence",
    "check_positive",
    "draw",
    "in_prompts",
    "inspect",
    "look",
    "posterior",
    "prompt_labels",
    "run_particles",
    "same_law",
    "sample_sites",
    "seeded",
    "site_terms",
    "site_value",
    "to_numpy",
    "token_scores",
    "traces",
]
