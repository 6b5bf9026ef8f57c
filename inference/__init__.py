"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .acquisition import Acquisition, Duel, InformationGain, Tilted
from .annealed import AnnealedSMC
from .baselines import ExponentialAverage
from .critic import Critic
from .draws import FromPosterior, Replay, of_prior
from .elicitation import Elicitation, FreshCompletions, Pool
from .exact import Exact
from .exploration import Boltzmann, EpsilonGreedy, Exploration, Random, Thompson
from .heldout import HeldOut
from .importance import ImportanceSampling
from .kernels import SuffixKernel
from .laplace import Laplace
from .mcmc import MCMC
from .nuts import NUTS
from .objectives import FDivergence, ForwardKL, LogVariance, Renyi, alpha_divergence
from .predictive import predict
from .program import ProgramError
from .rejection import BestOfN, RejectionSampling
from .results import EvidenceError
from .reverse_kl import ReverseKL
from .smc import SMC
from .soft_value_iteration import SoftValueIteration
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
    "laplace": Laplace,
}

__all__ = [
    "ENGINES",
    "MCMC",
    "NUTS",
    "SMC",
    "SVI",
    "Acquisition",
    "AnnealedSMC",
    "BestOfN",
    "Boltzmann",
    "Critic",
    "Duel",
    "Elicitation",
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
