"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .annealed import AnnealedSMC
from .control.controlled_smc import ControlledSMC
from .control.exploration import Boltzmann, EpsilonGreedy, Exploration, Random, Thompson
from .control.psrl import PSRL, EpisodicTask, Learning
from .control.soft_value_iteration import SoftValueIteration
from .control.state_values import StateValues
from .exact import Exact
from .importance import ImportanceSampling
from .laplace import Laplace
from .markov.suffix_kernel import SuffixKernel
from .mcmc import MCMC
from .nuts import NUTS
from .predictive import predict
from .preferences.acquisition import Acquisition, Duel, InformationGain, Tilted
from .preferences.elicitation import Elicitation, FreshCompletions, Pool
from .program import EvidenceError, ProgramError
from .rejection import BestOfN, RejectionSampling
from .sequential.twist_learning import TwistLearning
from .smc import SMC
from .svi import SVI
from .training.baselines import ExponentialAverage
from .training.beta_schedules import KLTarget, Tempering
from .training.critic import Critic
from .training.divergences import Divergence, FDivergence, ForwardKL, LogVariance, Renyi, alpha_divergence
from .training.held_out import HeldOut
from .training.reverse_kl import ReverseKL
from .training.sources import FromPosterior, Replay, of_prior
from .training.stopping import NearPosterior, Plateau
from .training.tensorboard import TensorBoard

ENGINES = {
    "exact": Exact,
    "importance": ImportanceSampling,
    "rejection": RejectionSampling,
    "bestofn": BestOfN,
    "smc": SMC,
    "annealed": AnnealedSMC,
    "mcmc": MCMC,
    "svi": SVI,
    "nuts": NUTS,
}

__all__ = [
    "ENGINES",
    "MCMC",
    "NUTS",
    "PSRL",
    "SMC",
    "SVI",
    "Acquisition",
    "AnnealedSMC",
    "BestOfN",
    "Boltzmann",
    "ControlledSMC",
    "Critic",
    "Divergence",
    "Duel",
    "Elicitation",
    "EpisodicTask",
    "EpsilonGreedy",
    "EvidenceError",
    "Exact",
    "Exploration",
    "ExponentialAverage",
    "FDivergence",
    "ForwardKL",
    "FreshCompletions",
    "FromPosterior",
    "HeldOut",
    "ImportanceSampling",
    "InformationGain",
    "KLTarget",
    "Laplace",
    "Learning",
    "LogVariance",
    "NearPosterior",
    "Plateau",
    "Pool",
    "ProgramError",
    "Random",
    "RejectionSampling",
    "Renyi",
    "Replay",
    "ReverseKL",
    "SoftValueIteration",
    "StateValues",
    "SuffixKernel",
    "Tempering",
    "TensorBoard",
    "Thompson",
    "Tilted",
    "TwistLearning",
    "alpha_divergence",
    "of_prior",
    "predict",
]
