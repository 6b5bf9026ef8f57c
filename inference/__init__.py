"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .annealed import AnnealedSMC
from .exact import Exact
from .importance import ImportanceSampling
from .kernels import SuffixKernel
from .mcmc import MCMC
from .nuts import NUTS
from .objectives import ReverseKL
from .program import ProgramError
from .rejection import BestOfN, RejectionSampling
from .results import EvidenceError
from .smc import SMC
from .svi import SVI
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
    "EvidenceError",
    "Exact",
    "ImportanceSampling",
    "ProgramError",
    "RejectionSampling",
    "ReverseKL",
    "SuffixKernel",
    "TwistLearning",
]
