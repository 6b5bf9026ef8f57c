"""bayeslm: reinforcement learning of language models as Bayesian inference.

`bayeslm.models` says what to infer, `bayeslm.inference` how; both need PyTorch and are imported by name. This package
itself needs NumPy and ArviZ only: it has `Posterior`, the result of every engine, and `diagnostics`, which judge it, so
that a machine without PyTorch can load, check and plot a saved posterior.
"""

import sys

# `python -m bayeslm` puts the working folder first on the path, where files of others may bear the names of packages.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("bayeslm", "-mbayeslm") and not sys.flags.safe_path:
    sys.path.pop(0)

from bayeslm import diagnostics
from bayeslm.posterior import Posterior
from bayeslm.posterior_draws import DiagnosticsWarning, PosteriorDraws
from bayeslm.version import __version__

__all__ = ["DiagnosticsWarning", "Posterior", "PosteriorDraws", "__version__", "diagnostics"]
