"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .adaptive_importance import AdaptiveImportance
from .annealed import AnnealedSMC
from .auto import Auto
from .exact import Exact
from .importance import ImportanceSampling
from .laplace import Laplace
from .mcmc import MCMC
from .moments import MomentFit, match_moments
from .nuts import NUTS
from .predictive import predict
from .program import EvidenceError, ProgramError, RankError, RunError, alone
from .rejection import BestOfN, RejectionSampling
from .smc import SMC
from .svi import SVI

ENGINES = {
    "exact": Exact,
    "importance": ImportanceSampling,
    "adaptive": AdaptiveImportance,
    "auto": Auto,
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
    "AdaptiveImportance",
    "AnnealedSMC",
    "Auto",
    "BestOfN",
    "EvidenceError",
    "Exact",
    "ImportanceSampling",
    "Laplace",
    "MomentFit",
    "ProgramError",
    "RankError",
    "RejectionSampling",
    "RunError",
    "alone",
    "match_moments",
    "predict",
]
