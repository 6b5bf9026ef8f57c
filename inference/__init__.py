"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .annealed import AnnealedSMC
from .baselines import ExponentialAverage
from .critic import Critic
from .draws import FromPosterior, Replay, of_prior
from .exact import Exact
from .heldout import HeldOut
from .importance import ImportanceSampling
from .kernels import SuffixKernel
from .mcmc import MCMC
from .nuts import NUTS
from .objectives import FDivergence, ForwardKL, LogVariance, Renyi, alpha_divergence
from .predictive import predict
from .program import ProgramError
from .rejection import BestOfN, RejectionSampling
from .results import EvidenceError
from .reverse_kl import ReverseKL
from .smc import SMC
from .stopping import NearPosterior, Plateau
from .svi import SVI
from .temperature import KLTarget, Tempering
from .tensorboard import TensorBoard
from .twisting import TwistLearning

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
    "EvidenceError",
    "Exact",
    "ExponentialAverage",
    "FDivergence",
    "ForwardKL",
    "FromPosterior",
    "HeldOut",
    "ImportanceSampling",
    "KLTarget",
    "LogVariance",
    "NearPosterior",
    "Plateau",
    "ProgramError",
    "RejectionSampling",
    "Renyi",
    "Replay",
    "ReverseKL",
    "SuffixKernel",
    "Tempering",
    "TensorBoard",
    "TwistLearning",
    "alpha_divergence",
    "of_prior",
    "predict",
]
