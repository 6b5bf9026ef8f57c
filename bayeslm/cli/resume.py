"""The output folder of a command that can be repeated, to resume a stopped run or to add an engine.

    out/call.json           the settings that the results depend on
    out/NAME/               the posterior of an engine
    out/NAME-interrupted/   the posterior of a run that was interrupted, until the engine has finished a run

A repeated command loads the results of engines that have finished, and runs the others.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from bayeslm.files import differences, read_header, require_empty, sweep, write_file
from bayeslm.posterior import Posterior

FORMAT = "bayeslm.call/2"


def reserve(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the output folder before any work, so that an unusable place is found at once; or accept it for resuming.

    :raises FileExistsError: if the folder holds something else than results.
    :raises ValueError: if it holds results of other settings; with the differences.
    """
    current = json.loads(json.dumps(settings))
    sweep(out)
    if (out / "call.json").is_file():
        found = differences(read_header(out, "call.json", FORMAT, "results")["settings"], current)
        if found and any(path.name != "call.json" for path in out.iterdir()):  # else there are no results to protect
            raise ValueError(f"{out} holds results of other settings: {'; '.join(found)}. Choose another --out")
    else:
        require_empty(out, choose="another --out")
    # This also checks that the folder can be written to.
    write_file(out / "call.json", json.dumps({"format": FORMAT, "settings": current}, indent=1))


def load(out: Path | None, name: str) -> Posterior | None:
    """Return the posterior of an engine that has finished; set an interrupted one aside and return None."""
    if out is None or not (out / name / "posterior.json").is_file():
        return None
    posterior = Posterior.load(out / name)
    if not posterior.stats.get("interrupted"):
        return posterior
    aside = out / f"{name}-interrupted"
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier interruption
    (out / name).rename(aside)
    return None


def save(out: Path, name: str, posterior: Posterior) -> None:
    """Save the posterior of an engine; if the engine has finished, remove an interrupted one.

    :raises OSError: if the disk refuses; a note says where the posterior, or at least its policy, is instead.
    """
    try:
        posterior.save(out / name)
    except OSError as error:
        error.add_note(rescue(out, name, posterior.save, posterior.policy))
        raise
    if not posterior.stats.get("interrupted"):
        shutil.rmtree(out / f"{name}-interrupted", ignore_errors=True)


def rescue(out: Path, name: str, save_all: Callable[[Path], object] | None, policy: Any) -> str:
    """Write results that the output folder has no room for: all to the temporary folder, or the trained policy alone.

    :param save_all: writes all results into a folder, or None.
    :returns: where they are, or that they are lost, in a sentence.
    """
    elsewhere = Path(tempfile.gettempdir()) / f"bayeslm-{uuid4().hex[:8]}"
    attempts: list[tuple[str, Callable[[Path], object] | None, Path]] = [
        ("results", save_all, elsewhere / name),
        ("trained weights", policy and policy.save_pretrained, out / f"{name}-policy-so-far"),
        ("trained weights", policy and policy.save_pretrained, elsewhere / f"{name}-policy"),
    ]
    for what, write, place in attempts:
        if write is not None:
            with contextlib.suppress(OSError):
                write(place)
                return f"the {what} of {name} are in {place} instead"
    return f"nothing of {name} could be saved in {elsewhere.parent} either: free some space, and repeat the command"
