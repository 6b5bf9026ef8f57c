"""bayeslm: reinforcement learning of language models as Bayesian inference.

`bayeslm.models` says what to infer, `bayeslm.inference` how to infer it; both need PyTorch and are imported
by name. This package is the face: what every engine returns (`Posterior`) and how to judge it
(`diagnostics`). It needs NumPy and ArviZ only, so a saved posterior can be read, checked and plotted on a
machine without PyTorch.
"""

__version__ = "0.1.0"

from bayeslm import diagnostics
from bayeslm.posterior import Posterior

__all__ = ["Posterior", "__version__", "diagnostics"]
