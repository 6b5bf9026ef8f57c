"""The output folder of a command that can be repeated, to resume a stopped run or to add an engine.

    out/.lock               held by the process that writes here
    out/call.json           the settings that the results depend on, and their digest
    out/NAME/               the posterior of an engine; its ``stats["call"]`` is a digest of NAME and the settings
    out/NAME-interrupted/   the posterior of a run that was interrupted, until the engine has finished a run

A repeated command loads the results of engines that have finished, and runs the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from bayeslm.files import differences, read_header, sweep, write_file
from bayeslm.locking import locked
from bayeslm.posterior import Posterior
from bayeslm.version import __version__

FORMAT = "bayeslm.call/3"
CALL, LOCK = "call.json", ".lock"


class Results:
    """The output folder of one call, held by this process; use it in a ``with`` block.

    :param out: made if there is none, or with results of an earlier such call; None: nothing is kept.
    :raises BlockingIOError: on entering, if another process writes there.
    :raises FileExistsError: on entering, if the folder holds something else than results.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._held = contextlib.ExitStack()
        self._settings: dict[str, Any] = {}

    def __enter__(self) -> Results:
        if (out := self.out) is not None:
            sweep(out)
            if not (out / CALL).is_file() and out.exists() and _is_used(out):
                raise FileExistsError(f"{out} exists and is not empty: choose another --out, or remove it first")
            out.mkdir(parents=True, exist_ok=True)
            held = f"{out} is written by another command: wait for its end, or choose another --out"
            self._held.enter_context(locked(out / LOCK, held))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Check some of this call's settings, those that are known so far, against the call that began the folder.

        :raises ValueError: if the folder holds results of other settings, with the differences, or is damaged.
        """
        if self.out is None or not (self.out / CALL).is_file():
            return
        begun = _read_settings(self.out)
        current = _as_json(settings)
        found = differences({name: begun.get(name) for name in current}, current)
        if found and {path.name for path in self.out.iterdir()} - {CALL, LOCK}:  # else there are no results to protect
            raise ValueError(f"{self.out} holds results of other settings: {'; '.join(found)}. Choose another --out")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write all settings of this call, or accept the folder for resuming.

        :raises ValueError: as `require_same`.
        """
        self._settings = _as_json({"version": __version__} | dict(settings))
        self.require_same(self._settings)
        if self.out is not None:
            header = {"format": FORMAT, "settings": self._settings, "digest": _digest(self._settings)}
            write_file(self.out / CALL, json.dumps(header, indent=1))

    def load(self, name: str) -> Posterior | None:
        """Return the posterior of an engine that has finished; set an interrupted one aside and return None.

        :raises ValueError: if it is damaged, or another call's.
        """
        if self.out is None or not (self.out / name).exists():
            return None
        posterior = Posterior.load(self.out / name)
        if posterior.stats.get("call") != _call(name, self._settings):
            raise ValueError(f"{self.out / name} is not a result of {name} in this call: remove it to run {name} again")
        if not posterior.stats.get("interrupted"):
            return posterior
        aside = self.out / f"{name}-interrupted"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier interruption
        (self.out / name).rename(aside)
        return None

    def save(self, name: str, posterior: Posterior) -> None:
        """Save the posterior of an engine; if the engine has finished, remove an interrupted one.

        :raises OSError: if the disk refuses; a note says where the posterior, or at least its policy, is instead.
        """
        if self.out is None:
            return
        posterior.stats["call"] = _call(name, self._settings)
        try:
            posterior.save(self.out / name)
        except OSError as error:
            error.add_note(rescue(self.out, name, posterior.save, posterior.policy))
            raise
        if not posterior.stats.get("interrupted"):
            shutil.rmtree(self.out / f"{name}-interrupted", ignore_errors=True)


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


def others(out: Path, posteriors: Mapping[str, Posterior]) -> list[str]:
    """Return the names of those posteriors in an output folder that are not results of its call.

    :raises ValueError: if ``call.json`` is damaged.
    """
    if not (out / CALL).is_file():
        return []
    settings = _read_settings(out)
    calls = {name: _call(name.removesuffix("-interrupted"), settings) for name in posteriors}
    return [name for name, posterior in posteriors.items() if posterior.stats.get("call") != calls[name]]


def _read_settings(out: Path) -> dict[str, Any]:
    header = read_header(out, CALL, FORMAT, "results")
    settings = header.get("settings")
    if not isinstance(settings, dict) or header.get("digest") != _digest(settings):
        raise ValueError(f"{out / CALL} is damaged: it is not what was written. Choose another --out")
    return settings


def _call(name: str, settings: Mapping[str, Any]) -> str:
    return _digest([name, settings])


def _is_used(out: Path) -> bool:
    return not out.is_dir() or bool({path.name for path in out.iterdir()} - {LOCK})


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
