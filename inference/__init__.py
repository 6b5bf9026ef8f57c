"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .annealed import AnnealedSMC
from .control.controlled_smc import ControlledSMC
from .control.exploration import Boltzmann, EpsilonGreedy, Exploration, Random, Thompson
from .control.psrl import PSRL, EpisodicTask, Learning
from .control.soft_value_iteration import SoftValueIteration
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
    "Duel",
    "Elicitation",
    "EpisodicTask",
    "EpsilonGreedy",
    "EvidenceError",
    "Exact",
    "Exploration",
    "FreshCompletions",
    "ImportanceSampling",
    "InformationGain",
    "Laplace",
    "Learning",
    "Pool",
    "ProgramError",
    "Random",
    "RejectionSampling",
    "SoftValueIteration",
    "SuffixKernel",
    "Thompson",
    "Tilted",
    "TwistLearning",
    "predict",
]
