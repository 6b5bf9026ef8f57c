"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .annealed import AnnealedSMC
from .exact import Exact
from .importance import ImportanceSampling
from .laplace import Laplace
from .markov.suffix_kernel import SuffixKernel
from .mcmc import MCMC
from .nuts import NUTS
from .predictive import predict
from .program import EvidenceError, ProgramError, RunError
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
    "SMC",
    "SVI",
    "AnnealedSMC",
    "BestOfN",
    "Critic",
    "Divergence",
    "EvidenceError",
    "Exact",
    "ExponentialAverage",
    "FDivergence",
    "ForwardKL",
    "FromPosterior",
    "HeldOut",
    "ImportanceSampling",
    "KLTarget",
    "Laplace",
    "LogVariance",
    "NearPosterior",
    "Plateau",
    "ProgramError",
    "RejectionSampling",
    "Renyi",
    "Replay",
    "ReverseKL",
    "RunError",
    "SuffixKernel",
    "Tempering",
    "TensorBoard",
    "TwistLearning",
    "alpha_divergence",
    "of_prior",
    "predict",
]
