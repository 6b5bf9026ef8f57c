"""How a guide is trained: objectives, baselines, sources of particles, callbacks, Adam, checkpoints, the loop."""

from .adaptation import Plan, run_adaptively
from .ahead import Ahead
from .auto_policy import AutoPolicy
from .baselines import Baseline, ExponentialAverage, Texts, TokenBaseline, TokenDistribution, leave_one_out
from .beta_schedules import KLTarget, Tempering
from .budget import Budget
from .callbacks import Callback, Reply, StepRecord
from .checkpoints import Checkpointing, Checkpoints, Saved, describe_run
from .critic import Critic
from .default_objective import default_objective
from .divergences import (
    Divergence,
    FDivergence,
    ForwardKL,
    LogDensities,
    LogVariance,
    ParticleObjective,
    Renyi,
    alpha_divergence,
)
from .held_out import HeldOut
from .history import stack_chains
from .identity import Identified, identify
from .loop import Training
from .objective import Estimate, Objective, StatefulLoss
from .optimizer import Adam
from .reverse_kl import ReverseKL
from .sources import FromPosterior, Replay, Source, of_guide, of_prior
from .state import EMPTY, State
from .stopping import NearPosterior, Plateau
from .tensorboard import TensorBoard
from .trust_region import TrustRegion

__all__ = [
    "EMPTY",
    "Adam",
    "Ahead",
    "AutoPolicy",
    "Baseline",
    "Budget",
    "Callback",
    "Checkpointing",
    "Checkpoints",
    "Critic",
    "Divergence",
    "Estimate",
    "ExponentialAverage",
    "FDivergence",
    "ForwardKL",
    "FromPosterior",
    "HeldOut",
    "Identified",
    "KLTarget",
    "LogDensities",
    "LogVariance",
    "NearPosterior",
    "Objective",
    "ParticleObjective",
    "Plan",
    "Plateau",
    "Renyi",
    "Replay",
    "Reply",
    "ReverseKL",
    "Saved",
    "Source",
    "State",
    "StatefulLoss",
    "StepRecord",
    "Tempering",
    "TensorBoard",
    "Texts",
    "TokenBaseline",
    "TokenDistribution",
    "Training",
    "TrustRegion",
    "alpha_divergence",
    "default_objective",
    "describe_run",
    "identify",
    "leave_one_out",
    "of_guide",
    "of_prior",
    "run_adaptively",
    "stack_chains",
]
