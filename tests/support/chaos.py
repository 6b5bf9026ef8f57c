"""Campaigns against runs and files: ``make chaos``, with ``ARGS="--trials 200 --seed 1"``.

Kills: a training with checkpoints and ``bayeslm infer --out`` are killed by SIGKILL at random moments and started again
until they end; every result must be to the bit that of a run that was not killed.

Corruptions: files of checkpoints, posteriors, policies, output folders and journals are damaged, exchanged, removed or
copied; each must end in the right result or in an error of one line that names a file there. Counted as failures are
*silent* ones, another result without an error, and *raw* ones, any other exception.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.models import tiny_llama
from support.programs import PROMPTS, score_table, tilted
from support.trainings import MODEL, SMALL, Killed, every_step
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.cli.journal import Journal
from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, Critic, LogVariance, Replay, ReverseKL
from bayeslm.models import LanguageModel
from bayeslm.posterior import Posterior

CLOCK = ("seconds", "call", "program")  # in ``stats``: the clock, and what only says which call and folder it was
LLAMA = tilted(tiny_llama(seed=1), score_table(1))

TRAININGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "elbo": (MODEL, {}),
    "replay": (MODEL, {"objective": LogVariance(8, Replay(20)), "num_chains": 2}),
    "critic": (MODEL, {"objective": ReverseKL(4, Critic())}),
    "network": (LLAMA, {"num_steps": 6, "num_particles": 2, "optimizer": Adam(1e-3)}),
}
INFER = ["infer", "a b", "c", "--prior", "model", "--reward", "my_rewards:letters", "--beta", "0.5", "--seed", "3"]
INFER += ["--max-new-tokens", "4", "--engine", "importance(num_particles=8), smc(num_particles=8)", "--out", "run"]
INFER += [
    "--engine",
    "svi(num_steps=6, num_particles=8, num_samples=8, guide=AutoPolicy(lora_rank=2), checkpoint='kept')",
]
REWARDS = "def letters(completions, **kwargs):\n    return [float(text.count('a')) for text in completions]\n"


def train(folder: Path, name: str, **more: Any) -> Posterior:
    """Train with a checkpoint after each step, and save the posterior."""
    model, settings = TRAININGS[name]
    engine = SVI(**SMALL | {"num_samples": 8} | settings | more, checkpoint=every_step(folder / "kept"))
    posterior = engine.run(model, PROMPTS)
    if not (folder / "result").exists():
        posterior.save(folder / "result")
    return posterior


def infer(folder: Path, *more: str) -> tuple[int, str]:
    """Run ``bayeslm infer`` in a working directory; return its exit code and what it printed.

    :raises Exception: what the command line did not make one line of.
    """
    return command(folder, *INFER, *more)


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    for name in ("my_rewards", "judges"):
        sys.modules.pop(name, None)
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, list(arguments))
    finally:
        os.chdir(before)
        sys.path[:] = path
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def workplace(folder: Path) -> Path:
    """Return a working directory with a model and a reward."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(scale=1.0).save_pretrained(folder / "model")
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def same(one: Any, other: Any) -> bool:
    """Whether two values of posteriors are equal to the bit, but for the clock."""
    if isinstance(one, dict):
        keys = one.keys() - set(CLOCK)
        return keys == other.keys() - set(CLOCK) and all(same(one[key], other[key]) for key in keys)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one == other) or (one != one and other != other)


def same_posterior(one: Path, other: Path) -> bool:
    """Whether two saved posteriors are equal, their policies' weights included."""
    fields = [{k: x for k, x in vars(Posterior.load(path)).items() if k != "policy_path"} for path in (one, other)]
    weights = [[file.read_bytes() for file in sorted(path.glob("policy/*.safetensors"))] for path in (one, other)]
    return same(*fields) and weights[0] == weights[1]


# -- kills ---------------------------------------------------------------------------------------------------


def forked(work: Callable[[], Any], seconds: float | None = None) -> bool:
    """Do some work in a process of its own, which is killed after so many seconds; return whether it came to its end.

    :raises RuntimeError: if the work raised an error, with what it printed.
    """
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed below
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(os.dup(log.fileno()), "w")
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    start = time.monotonic()
    while (status := os.waitpid(process, os.WNOHANG))[0] == 0:
        if seconds is not None and time.monotonic() - start > seconds:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            log.close()
            return False
        time.sleep(0.002)
    log.seek(0)
    text = log.read()
    log.close()
    if os.waitstatus_to_exitcode(status[1]) != 0:
        raise RuntimeError(text)
    return True


def infer_or_raise(folder: Path) -> None:
    code, output = infer(folder)
    if code != 0:
        raise RuntimeError(output)


def kill_campaign(trials: int, rng: random.Random, root: Path, most_kills: int = 12) -> Counter[str]:
    """Kill runs at random moments and start them again, ``trials`` times in all; return counts."""
    counts: Counter[str] = Counter()
    works = {f"training, {name}": functools.partial(train, name=name) for name in TRAININGS} | {"infer": infer_or_raise}
    seconds = {}
    for name, work in works.items():
        whole = workplace(root / "whole" / name) if name == "infer" else root / "whole" / name
        start = time.monotonic()
        forked(functools.partial(work, whole))
        seconds[name] = time.monotonic() - start
    folder = root / "run"
    while counts["kills"] < trials:
        name = rng.choice(list(works))
        shutil.rmtree(folder, ignore_errors=True)
        if name == "infer":
            workplace(folder)
        work = functools.partial(works[name], folder)
        try:
            for _ in range(min(most_kills, trials - counts["kills"])):
                if forked(work, rng.uniform(0.0, 1.2) * seconds[name]):
                    break
                counts["kills"] += 1
            forked(work)
        except RuntimeError as error:
            counts["failures"] += 1
            print(f"{name}: a killed run did not resume:\n{error}", file=sys.stderr)
            continue
        ends = ["run/importance", "run/smc", "run/svi"] if name == "infer" else ["result"]
        equal = all(same_posterior(folder / end, root / "whole" / name / end) for end in ends)
        counts["runs"] += 1
        counts["bit-equal" if equal else "failures"] += 1
        if not equal:
            print(f"{name}: another result after kills", file=sys.stderr)
    return counts


# -- corruptions ---------------------------------------------------------------------------------------------


def _flip(path: Path, rng: random.Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random, _: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _zero(path: Path, rng: random.Random, _: Path) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def _append(path: Path, rng: random.Random, _: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 40)))


def _remove(path: Path, _rng: random.Random, _: Path) -> None:
    path.unlink()


def _other(path: Path, _rng: random.Random, other: Path) -> None:
    """Put the file of another run in its place."""
    if other.is_file():
        path.write_bytes(other.read_bytes())


def _sibling(path: Path, rng: random.Random, _: Path) -> None:
    """Put another file of the folder in its place."""
    files = [x for x in path.parent.iterdir() if x.is_file()]
    path.write_bytes(rng.choice(files).read_bytes())


def _copy(path: Path, rng: random.Random, _: Path) -> None:
    """Copy the file's folder beside it, under a name that says less or more."""
    name = rng.choice([f"{path.parent.name} (copy)", f"{path.parent.name}-backup", "chain-0-step-99", "chain-1-step-2"])
    shutil.copytree(path.parent, path.parent.parent / name, dirs_exist_ok=True)


OPERATIONS = {f.__name__[1:]: f for f in (_flip, _flip, _flip, _cut, _zero, _append, _remove, _other, _sibling, _copy)}


class Case:
    """Something on disk, how it is used, and what must come out."""

    def __init__(self, root: Path, other: Path, files: str, use: Callable[[Path], Any], lines: bool = False) -> None:
        self.root, self.other, self.files, self.use, self.lines = root, other, files, use, lines
        self.expected = self._used(root)

    def _used(self, root: Path) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(root, Path(folder) / "copy")
            return self.use(Path(folder) / "copy")

    def corrupted(self, rng: random.Random, target: Path) -> tuple[str, str]:
        """Return what was done, and what came of it: right, refused, silent or raw."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.root, target)
        path = rng.choice(sorted(x for x in target.glob(self.files) if x.is_file() and x.stat().st_size))
        place = path.relative_to(target)
        name = rng.choice(["flip", "cut", "zero"] if self.lines else [*OPERATIONS, "flip", "flip"])
        OPERATIONS[name](path, rng, self.other / place)
        done = f"{name} {place}"
        try:
            result = self.use(target)
        except (ValueError, OSError, TypeError) as error:
            text = " ".join(str(error).split())
            return done, "refused" if any(part in text for part in _names(target)) else f"raw: {text}"
        except Exception as error:
            return done, f"raw: {type(error).__name__}: {error}"
        return done, "right" if self._right(result, name) else "silent"

    def _right(self, result: Any, operation: str) -> bool:
        if self.lines:  # an incomplete last line is removed; and a cut file is one that was closed before
            least = 0 if operation == "cut" else len(self.expected) - 1
            return bool(result == self.expected[: len(result)]) and len(result) >= least
        return same(self.expected, result)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} | {folder.name, "SHA256SUMS", "checkpoint.json"}


def _fields(posterior: Posterior) -> dict[str, Any]:
    weights = {}
    if posterior.policy is not None:
        weights = {k: x.detach().numpy() for k, x in posterior.policy.named_parameters()}
    return {k: x for k, x in vars(posterior).items() if k not in ("policy", "policy_path")} | {"weights": weights}


def _resumed(folder: Path) -> Any:
    return _fields(SVI(**SMALL | {"num_samples": 8, "num_chains": 2}, checkpoint=folder).run(MODEL, PROMPTS))


def _loaded(folder: Path) -> Any:
    return _fields(Posterior.load(folder))


def _policy(folder: Path) -> Any:
    lm = LanguageModel.from_pretrained(folder / "policy", base=tiny_llama(seed=1))
    return lm(["a b", "c"], 3).log_prob(torch.tensor([[1, 2, 0], [3, 0, 0]])).detach().numpy()


def _repeated(folder: Path) -> Any:
    """What a repeated command gives: its own results, or an error in one line."""
    code, output = infer(folder)
    if code != 0:
        raise ValueError(output)
    return {name: _fields(Posterior.load(folder / "run" / name)) for name in ("importance", "smc", "svi")}


def _retrained(folder: Path) -> Any:
    """What a repeated command makes of a checkpoint, where there is no result yet."""
    shutil.rmtree(folder / "run/svi")
    return _repeated(folder)


def _shown(folder: Path) -> Any:
    code, output = command(folder, "show", "run")
    if code != 0:
        raise ValueError(output)
    said = re.compile(r"run/[^\n]*:\s+left\s+out,\s+a\s+copy\s+or\s+a\s+result\s+of\s+another\s+call\s*")
    return said.sub("", output)  # of a copied folder, which is said and not shown


def _rows(folder: Path) -> Any:
    with Journal(folder / "labels.jsonl") as journal:
        return [{k: x for k, x in row.items() if k in ("prompt", "chosen", "n")} for row in journal.rows]


def _write_checkpoints(folder: Path, seed: int) -> None:
    """Of a run that was killed in its second chain."""
    settings = SMALL | {"num_samples": 8, "num_chains": 2, "seed": seed}
    with contextlib.suppress(Killed):
        SVI(**settings, checkpoint=every_step(folder), callbacks=[_at(1, 4)]).run(MODEL, PROMPTS)


def _write_posterior(folder: Path, seed: int) -> None:
    """With a policy that is an adapter."""
    model, own = TRAININGS["network"]
    posterior = SVI(**SMALL | own | {"num_samples": 8, "seed": seed}).run(model, PROMPTS)
    policy = tiny_llama(seed=1).policy(lora_rank=2)
    with torch.no_grad():
        for i, p in enumerate(x for x in policy.parameters() if x.requires_grad):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    dataclasses.replace(posterior, policy=policy).save(folder)


def _write_place(folder: Path, seed: int) -> None:
    infer(workplace(folder), *(["--seed", "9"] if seed else []))


def _write_journal(folder: Path, seed: int) -> None:
    with Journal(folder / "labels.jsonl") as journal:
        for n in range(6):
            journal.append({"prompt": f"p{seed}", "chosen": f"text {n}, été", "n": n})


# what is written, which of its files are corrupted, and how it is used
CASES: dict[str, tuple[Callable[[Path, int], None], str, Callable[[Path], Any]]] = {
    "checkpoints": (_write_checkpoints, "chain-*/*", _resumed),
    "posterior": (_write_posterior, "**/*", _loaded),
    "policy": (_write_posterior, "policy/*", _policy),
    "infer --out": (_write_place, "run/**/*", _repeated),
    "infer --checkpoint": (_write_place, "kept/**/*", _retrained),
    "show": (_write_place, "run/*/*", _shown),
    "journal": (_write_journal, "labels.jsonl", _rows),
}


def make_cases(root: Path, names: Collection[str]) -> dict[str, Case]:
    """Write what is corrupted, twice: the second has another seed, for exchanges."""
    cases = {}
    for name in names:
        write, files, use = CASES[name]
        folders = [root / write.__name__ / place for place in ("one", "two")]
        for seed, folder in zip((0, 5), folders, strict=True):
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                write(folder, seed)
        cases[name] = Case(*folders, files, use, lines=name == "journal")
    return cases


def _at(chain: int, step: int) -> Callable[[Any], None]:
    def kill(record: Any) -> None:
        if (record.chain, record.step) == (chain, step):
            raise Killed

    return kill


def corruption_campaign(
    trials: int, rng: random.Random, root: Path, names: Collection[str] = tuple(CASES)
) -> Counter[str]:
    """Corrupt something at random, ``trials`` times; return counts."""
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged checkpoints that were passed over
        cases = make_cases(root, names)
        for _ in range(trials):
            name = rng.choice(list(cases))
            with contextlib.redirect_stderr(io.StringIO()):
                done, found = cases[name].corrupted(rng, root / "corrupted")
            kind = found.partition(":")[0]
            counts["corruptions"] += 1
            counts[f"{name}: {kind}"] += 1
            if kind in ("silent", "raw"):
                counts["failures"] += 1
                print(f"{name}: {done}: {found}", file=sys.stderr)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="kills, and corruptions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for campaign in (kill_campaign, corruption_campaign):
        with tempfile.TemporaryDirectory() as folder:
            counts = campaign(options.trials, random.Random(options.seed), Path(folder))
        print(f"{campaign.__name__.replace('_', ' ')}, seed {options.seed}")
        for name, count in sorted(counts.items()):
            print(f"  {name:32} {count}")
        failures += counts["failures"]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
