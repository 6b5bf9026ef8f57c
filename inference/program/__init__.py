"""A Pyro program as engines see it: its sites and plates, its particles, and the posterior that they give."""

from .assign import assign_values, same_distribution, score_values
from .description import describe, describe_object, prompt_labels, prompt_texts
from .errors import EvidenceError, ProgramError
from .guides import PolicyGuide, as_proposal, check_draws_texts, draw_latents
from .handlers import PARTICLES, PROMPTS, Arbitrary, Assign, Assignment, RandomStates, seeded, set_seed
from .independence import check_independence
from .messages import Message, digest_of, seed_of
from .partial import PartialRun
from .particles import (
    Particles,
    all_to_numpy,
    gathered,
    particles_of,
    run_particles,
    sampled_terms,
    score_sites,
    to_numpy,
    traces,
)
from .program import STEPS, Program, along, inspect, inspect_or_reuse
from .ranks import ALONE, RankError, Ranks, alone, on_first, ranks
from .results import check_evidence, check_grammar, posterior, token_bytes
from .run import Engine, RunError, SoFar, Stopwatch, draw, keeping, of_prompts, running
from .sites import Site, in_prompts, sample_sites, site_value

__all__ = [
    "ALONE",
    "PARTICLES",
    "PROMPTS",
    "STEPS",
    "Arbitrary",
    "Assign",
    "Assignment",
    "Engine",
    "EvidenceError",
    "Message",
    "PartialRun",
    "Particles",
    "PolicyGuide",
    "Program",
    "ProgramError",
    "RandomStates",
    "RankError",
    "Ranks",
    "RunError",
    "Site",
    "SoFar",
    "Stopwatch",
    "all_to_numpy",
    "alone",
    "along",
    "as_proposal",
    "assign_values",
    "check_draws_texts",
    "check_evidence",
    "check_grammar",
    "check_independence",
    "describe",
    "describe_object",
    "digest_of",
    "draw",
    "draw_latents",
    "gathered",
    "in_prompts",
    "inspect",
    "inspect_or_reuse",
    "keeping",
    "of_prompts",
    "on_first",
    "particles_of",
    "posterior",
    "prompt_labels",
    "prompt_texts",
    "ranks",
    "run_particles",
    "running",
    "same_distribution",
    "sample_sites",
    "sampled_terms",
    "score_sites",
    "score_values",
    "seed_of",
    "seeded",
    "set_seed",
    "site_value",
    "to_numpy",
    "token_bytes",
    "traces",
]
