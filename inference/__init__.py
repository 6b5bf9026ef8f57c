"""How to infer it: interchangeable engines, each ``Engine(...).run(model, *args, **kwargs) -> Posterior``."""

from .exact import Exact
from .importance import ImportanceSampling
from .objectives import ReverseKL
from .program import ProgramError
from .rejection import BestOfN, RejectionSampling
from .results import EvidenceError
from .svi import SVI

ENGINES = {
    "exact": Exact,
    "importance": ImportanceSampling,
    "rejection": RejectionSampling,
    "bestofn": BestOfN,
    "svi": SVI,
}

__all__ = [
    "ENGINES",
    "SVI",
    "BestOfN",
    "EvidenceError",
    "Exact",
    "ImportanceSampling",
    "ProgramError",
    "RejectionSampling",
    "ReverseKL",
]
