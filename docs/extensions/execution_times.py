"""How long the notebooks have run: printed at the end of a build."""

from __future__ import annotations

from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx


def report(app: Sphinx, exception: Exception | None) -> None:
    """Print the sum of the seconds of all notebooks, those from the cache included, and the slowest."""
    data = {name: NbMetadataCollector.get_exec_data(app.env, name) for name in app.env.found_docs}
    seconds = {name: float(one["runtime"]) for name, one in data.items() if one and one["runtime"] is not None}
    if exception is not None or not seconds:
        return
    total, slowest = sum(seconds.values()), max(seconds, key=lambda name: seconds[name])
    print(f"==> {len(seconds)} notebooks ran for {total:.0f} s, the slowest {slowest} for {seconds[slowest]:.0f} s")


def setup(app: Sphinx) -> dict[str, bool]:
    """Call `report` at the end."""
    app.connect("build-finished", report)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
