"""What kernels run first when the site is built: without progress bars, and with warnings as words alone."""

import functools
import warnings

from bayeslm import progress

progress.track = functools.partial(progress.track, enabled=False)
warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
warnings.filterwarnings("ignore", message="IProgress not found")
