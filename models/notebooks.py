"""In a notebook without ipywidgets Pyro's progress bars warn as they are imported; nothing here uses these bars."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401, imported here first; after an `import pyro` of the user's own it has warned already
