"""A call of the command line that can be made again: its output folder says what it was, and holds what is done of it.

    out/call.json           the options that its results depend on
    out/NAME/               the posterior of an engine, once it is whole
    out/NAME-interrupted/   one that Ctrl-C cut short, until the engine has run to its end

What is whole is read when the call is made again, and the rest is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslm.files import differences, read_header, require_empty
from bayeslm.posterior import Posterior

FORMAT = "bayeslm.call/1"


def reserve(out: Path, call: Mapping[str, Any]) -> None:
    """Make the output folder before the work, so that a bad place costs nothing; or find it as the same call left it.

    :raises FileExistsError: if it holds anything else.
    :raises ValueError: if it holds another call's results, with what differs.
    """
    told = json.loads(json.dumps(call))
    if (out / "call.json").is_file():
        found = differences(read_header(out, "call.json", FORMAT, "call")["call"], told)
        if found and any(path.name != "call.json" for path in out.iterdir()):  # else it came to nothing
            raise ValueError(f"{out} holds the results of another call: {'; '.join(found)}. Choose another --out")
    else:
        require_empty(out, choose="another --out")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / ".call.json"  # also a look whether the place can be written
    unfinished.write_text(json.dumps({"format": FORMAT, "call": told}, indent=1), encoding="utf-8")
    unfinished.rename(out / "call.json")


def done(out: Path | None, name: str) -> Posterior | None:
    """What an engine has given, if it came to its end."""
    if out is None or not (out / name / "posterior.json").is_file():
        return None
    posterior = Posterior.load(out / name)
    if not posterior.stats.get("interrupted"):
        return posterior
    cut = out / f"{name}-interrupted"
    shutil.rmtree(cut, ignore_errors=True)  # of the time before
    (out / name).rename(cut)
    return None


def keep(out: Path, name: str, posterior: Posterior) -> None:
    """Save what an engine gives; an interrupted one before it goes when this one has come to its end."""
    posterior.save(out / name)
    if not posterior.stats.get("interrupted"):
        shutil.rmtree(out / f"{name}-interrupted", ignore_errors=True)
