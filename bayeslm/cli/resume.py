"""The output folder of a command that can be repeated, to resume a stopped run or to add an engine.

    out/.lock               held by the process that writes here
    out/run.yaml            the settings as `bayeslm infer --config` reads them
    out/call.json           the same with all that results depend on, and a digest
    out/NAME/               the posterior of an engine; its ``stats["call"]`` is a digest of NAME and what it depends on
    out/NAME-interrupted/   the posterior of a run that was interrupted, until the engine has finished a run
    out/NAME-twist/         the twist that was learned for it

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

from bayeslm.files import differences, read_header, require_writable, sweep, write_file
from bayeslm.locking import locked
from bayeslm.posterior import Posterior
from bayeslm.version import __version__

from .plain_yaml import write_yaml

FORMAT = "bayeslm.call/4"
CALL, LOCK, RUN = "call.json", ".lock", "run.yaml"
Json = dict[str, Any]


class Results:
    """The output folder of one call, held by this process; use it in a ``with`` block.

    :param out: made if there is none, or with results of an earlier such call; None: nothing is kept.
    :raises BlockingIOError: on entering, if another process writes there.
    :raises FileExistsError: on entering, if the folder holds something else than results.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._held = contextlib.ExitStack()
        self._call: Json = {"settings": {}, "engines": {}, "run": {}}

    def __enter__(self) -> Results:
        if (out := self.out) is not None:
            sweep(out)
            require_writable(out)
            if not (out / CALL).is_file() and out.exists() and _is_used(out):
                raise FileExistsError(f"{out} exists and is not empty: choose another --out, or remove it first")
            out.mkdir(parents=True, exist_ok=True)
            held = f"{out} is written by another command: wait for its end, or choose another --out"
            self._held.enter_context(locked(out / LOCK, held))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    def require_same(self, settings: Mapping[str, Any], engines: Mapping[str, Any]) -> None:
        """Check some of this call's settings, those that are known so far, against the call that began the folder.

        :param settings: that the results of all engines depend on.
        :param engines: settings of each engine. Those of an engine that has no result may change.
        :raises ValueError: if the folder holds results of other settings, with the differences, or is damaged.
        """
        if self.out is None or not (self.out / CALL).is_file():
            return
        begun, current = _read_call(self.out), _as_json(settings)
        if not _results(self.out):
            return
        found = differences({name: begun["settings"].get(name) for name in current}, current)
        kept = {name: x for name, x in begun["engines"].items() if name in engines and _results(self.out, name)}
        found += differences(kept, _as_json({name: engines[name] for name in kept}))
        if found:
            raise ValueError(f"{self.out} holds results of other settings: {'; '.join(found)}. Choose another --out")

    def begin(self, settings: Mapping[str, Any], engines: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Write all settings of this call, or accept the folder for resuming.

        :param run: the settings as a settings file has them. Engines with results of earlier calls are added.
        :raises ValueError: as `require_same`.
        """
        self._call = _as_json(
            {"settings": {"version": __version__} | dict(settings), "engines": dict(engines), "run": dict(run)}
        )
        self.require_same(self._call["settings"], engines)
        if self.out is None:
            return
        if (self.out / CALL).is_file():
            before = _read_call(self.out)
            kept = [name for name in before["engines"] if name not in engines and _results(self.out, name)]
            self._call["engines"] = {name: before["engines"][name] for name in kept} | self._call["engines"]
            earlier = {name: before["run"]["engines"][name] for name in kept if "engines" in before["run"]}
            if "engines" in self._call["run"]:
                self._call["run"]["engines"] = earlier | self._call["run"]["engines"]
        header = {"format": FORMAT, "digest": _digest(self._call), **self._call}
        write_file(self.out / CALL, json.dumps(header, indent=1))
        if self._call["run"]:
            about = f"# Written by bayeslm {__version__}. To run it again, in the same working folder:\n"
            about += "# bayeslm infer --config THIS_FILE\n"
            write_file(self.out / RUN, about + write_yaml(self._call["run"]))

    def load(self, name: str) -> Posterior | None:
        """Return the posterior of an engine that has finished; set an interrupted one aside and return None.

        :param name: of the engine.
        :raises ValueError: if it is damaged, or another call's.
        """
        if self.out is None or not (self.out / name).exists():
            return None
        posterior = Posterior.load(self.out / name)
        if posterior.stats.get("call") != _call(name, self._call):
            raise ValueError(f"{self.out / name} is not a result of {name} in this call: remove it to run {name} again")
        if not posterior.stats.get("interrupted"):
            return posterior
        aside = self.out / f"{name}-interrupted"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier interruption
        (self.out / name).rename(aside)
        return None

    def save(self, name: str, posterior: Posterior) -> None:
        """Save the posterior of an engine; if the engine has finished, remove an interrupted one.

        :param name: of the engine.
        :param posterior: whose ``stats["call"]`` is set.
        :raises OSError: if the disk refuses; a note says where the posterior, or at least its policy, is instead.
        """
        if self.out is None:
            return
        posterior.stats["call"] = _call(name, self._call)
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
    call = _read_call(out)
    calls = {name: _call(name.removesuffix("-interrupted"), call) for name in posteriors}
    return [name for name, posterior in posteriors.items() if posterior.stats.get("call") != calls[name]]


def unfinished(out: Path, posteriors: Mapping[str, Posterior]) -> list[str]:
    """Return the names of the engines of an output folder's call that have no result in it.

    :raises ValueError: if ``call.json`` is damaged.
    """
    if not (out / CALL).is_file():
        return []
    return [name for name in _read_call(out)["engines"] if not {name, f"{name}-interrupted"} & posteriors.keys()]


def run_settings(out: Path) -> dict[str, str]:
    """Return the settings that an output folder was run with, as texts by name; none of a folder of another kind.

    :raises ValueError: if ``call.json`` is damaged.
    """
    if not (out / CALL).is_file():
        return {}
    run = dict(_read_call(out)["run"])
    engines = {f"engine {name}": own for name, own in (run.pop("engines", None) or {}).items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in (run | engines).items()}


def identities(values: Mapping[str, Any]) -> Json:
    """Return what tells values of other content apart, by name."""
    from bayeslm.inference.training import identify

    return {name: identify(value) for name, value in values.items()}


def _read_call(out: Path) -> Json:
    header = read_header(out, CALL, FORMAT, "results")
    call = {name: header.get(name) for name in ("settings", "engines", "run")}
    if not all(isinstance(x, dict) for x in call.values()) or header.get("digest") != _digest(call):
        raise ValueError(f"{out / CALL} is damaged: it is not what was written. Choose another --out")
    return call


def _call(name: str, call: Json) -> str:
    return _digest([name, call["settings"], call["engines"].get(name)])


def _results(out: Path, engine: str | None = None) -> list[str]:
    """Return the names of what an output folder holds of an engine, or of all."""
    names = [path.name for path in out.iterdir() if path.name not in (CALL, LOCK, RUN)]
    return [name for name in names if engine is None or name == engine or name.startswith(f"{engine}-")]


def _is_used(out: Path) -> bool:
    return not out.is_dir() or bool({path.name for path in out.iterdir()} - {LOCK})


def _as_json(settings: Mapping[str, Any]) -> Json:
    """Return settings as they are read back, with 1.0 as 1, which are the same setting."""
    return dict(json.loads(json.dumps(settings), parse_float=_number))


def _number(text: str) -> float:
    return int(float(text)) if float(text).is_integer() else float(text)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
