"""Moments beside disco (naver): the coefficients of "half of the texts contain this word", of equally many draws.

    OMP_NUM_THREADS=1 DISCO=/path/to/a/checkout python benchmarks/moments.py

The prior is a small random Llama, so that the coefficients are known by enumeration. DISCO is put on the path of
disco's process: a checkout of https://github.com/naver/disco and, after a colon, a folder with the package datasets.
Without it bayeslm's rows alone are printed. bayeslm's seconds include its check by draws of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _peer import Peer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.models import tiny_llama

from bayeslm.inference import Exact, ImportanceSampling, match_moments
from bayeslm.models import Moment, TiltedLM, rewards

CONTEXT, LENGTH = "a c", 5
EXAMPLES = {"half have b": {"b": 0.5}, "half have b, a fifth d": {"b": 0.5, "d": 0.2}, "nine tenths have b": {"b": 0.9}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--draws", type=int, default=512, help="disco's default")
    options = parser.parse_args()
    lm = tiny_llama(seed=1, scale=1.5)
    base = TiltedLM(lm, None, max_new_tokens=LENGTH)
    paths = os.environ.get("DISCO", "")
    peer = None
    kept = tempfile.TemporaryDirectory()
    folder = kept.name
    if paths:
        lm.save_pretrained(f"{folder}/model")
        peer = Peer("disco", None, "_disco_worker.py", *paths.split(":"))
    header = [
        "example",
        "prior's moments",
        "exact coefficients",
        "library",
        "mean error",
        "sd",
        "stated error",
        "seconds",
    ]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    match_moments(base, [CONTEXT], [Moment(rewards.Contains("b"), 0.5)], engine=Exact())  # to warm up
    for name, targets in EXAMPLES.items():
        wanted = [Moment(rewards.Contains(word), share) for word, share in targets.items()]
        exact = match_moments(base, [CONTEXT], wanted, engine=Exact())
        found: dict[str, list[Any]] = {"bayeslm": [], "disco": []}
        stated, seconds = [], {"bayeslm": 0.0, "disco": 0.0}
        for seed in range(options.seeds):
            engine = ImportanceSampling(options.draws, seed=1000 * seed, progress=False)
            start = time.perf_counter()
            fit = match_moments(base, [CONTEXT], wanted, engine=engine, min_ess=1.0)
            seconds["bayeslm"] += time.perf_counter() - start
            found["bayeslm"].append(fit.coefficients)
            stated.append(fit.coefficients_stderr)
            if peer is not None:
                shares = list(targets.values())
                problem = {"folder": f"{folder}/model", "context": CONTEXT, "words": list(targets), "targets": shares}
                reply = peer.ask(problem | {"samples": options.draws, "length": LENGTH, "seed": seed})
                seconds["disco"] += reply["seconds"]
                found["disco"].append(reply["coefficients"])
        for library, rows in found.items():
            if rows:
                error = np.array(rows) - exact.coefficients
                cells = [name, exact.base_moments, exact.coefficients, library, error.mean(0), error.std(0, ddof=1)]
                cells += [np.mean(stated, 0) if library == "bayeslm" else "–", seconds[library] / options.seeds]
                print("| " + " | ".join(map(cell, cells)) + " |", flush=True)
    if peer is not None:
        peer.close()
    kept.cleanup()


def cell(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(f"{x:.3f}" for x in np.atleast_1d(value))


if __name__ == "__main__":
    main()
