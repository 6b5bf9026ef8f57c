"""How long the notebooks have run: printed at the end of a build, an error if it is more than NOTEBOOK_SECONDS."""

from __future__ import annotations

import os

from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.errors import SphinxError


def report(app: Sphinx, exception: Exception | None) -> None:
    """Print the sum of the seconds of all notebooks, those from the cache included, and the slowest.

    :raises SphinxError: if it is above the environment's NOTEBOOK_SECONDS, where that is set.
    """
    data = {name: NbMetadataCollector.get_exec_data(app.env, name) for name in app.env.found_docs}
    seconds = {name: float(one["runtime"]) for name, one in data.items() if one and one["runtime"] is not None}
    if exception is not None or not seconds:
        return
    total, slowest = sum(seconds.values()), max(seconds, key=lambda name: seconds[name])
    text = f"{len(seconds)} notebooks ran for {total:.0f} s, the slowest {slowest} for {seconds[slowest]:.0f} s"
    print(f"==> {text}")
    if total > (limit := float(os.environ.get("NOTEBOOK_SECONDS", "inf"))):
        raise SphinxError(f"{text}: no more than {limit:.0f} s are allowed")


def setup(app: Sphinx) -> dict[str, bool]:
    """Call `report` at the end."""
    app.connect("build-finished", report)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
