"""Sequential Monte Carlo on SmolLM2-135M, side by side: bayeslm's `SMC` and genlm-control, in turn.

    python benchmarks/genlm_control.py [--particles 8 16 32 64] [--runs 5] [--tokens 24]

The same on both sides: network (float32), torch and transformers (those of constraints.txt), threads, prompt, target
p(x) exp(r(x) / beta) with r VADER's sentiment and beta = 0.1, intermediate targets (the sentiment of the text so far),
proposal (the prior), systematic resampling below half the effective sample size. A text that reaches the limit is
weighed as it stands, as is one that ends earlier, so that both estimate the same Z (last column). Each runs at its
best settings for this network: bayeslm's weights are packed; `_genlm_worker.py` says what genlm-control's are. It lives
in an environment of its own, build/genlm, made at the first run (about 2 GB), and is driven through pipes; loading the
networks, and packing ours, is not timed.

Tokens are those of the final texts, on both sides. On a GPU genlm-control advises vLLM, which this does not install.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _figures import log_mean, variance_ratio

from bayeslm.inference import SMC
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "My dinner at the restaurant was"
BETA = 0.1
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "genlm"
REQUIREMENTS = ["genlm-control==0.4.1", "genlm-backend==0.3.1", "genlm-bytes==0.2.0", "genlm-grammar==0.2.0"]


class Run(NamedTuple):
    seconds: float
    tokens: int
    log_evidence: float


class Peer:
    """genlm-control in a process of its own."""

    def __init__(self, lm: LanguageModel, tokens: int) -> None:
        problem = {
            "model": lm.network.name_or_path,
            "prompt": lm.tokenizer(PROMPT)["input_ids"],
            "eos": lm.eos_token_ids,
            "beta": BETA,
            "tokens": tokens,
            "device": str(lm.device),
            "threads": torch.get_num_threads(),
        }
        command = [_environment(), Path(__file__).with_name("_genlm_worker.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell(problem)

    def _tell(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def run(self, particles: int, seed: int) -> Run:
        self._tell({"particles": particles, "seed": seed})
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"genlm-control's process ended before it answered, with code {self.process.wait()}")
        return Run(**json.loads(answer))


def _environment() -> Path:
    """The Python of genlm-control's environment, which is made if it is not there."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / "installed.txt"
    constraints = ROOT / "constraints.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n" + constraints.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"==> installing genlm-control into {FOLDER.relative_to(ROOT)}", file=sys.stderr)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", constraints]
        try:
            subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
            subprocess.run([*pip, *REQUIREMENTS, "vaderSentiment"], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"genlm-control could not be installed: {error}")
        stamp.write_text(wanted)
    return python


def ours(model: TiltedLM, particles: int, seed: int) -> Run:
    engine = SMC(num_particles=particles, twist="partial", resampling="systematic", seed=seed, progress=False)
    start = time.perf_counter()
    posterior = engine.run(model, [PROMPT])
    seconds = time.perf_counter() - start
    return Run(seconds, int(posterior.lengths["completion"].sum()), float(posterior.log_evidence[0]))


def row(particles: int, peers: list[Run], own: list[Run]) -> str:
    speeds = [[run.tokens / run.seconds for run in runs] for runs in (peers, own)]
    ratios = [b / a for a, b in zip(*speeds, strict=True)]
    logs = [[run.log_evidence for run in runs] for runs in (peers, own)]
    evidence = ", ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in map(log_mean, logs))
    return (
        f"| {particles} | {statistics.median(speeds[0]):.1f} | {statistics.median(speeds[1]):.1f} "
        f"| {statistics.median(ratios):.1f}; {min(ratios):.1f} to {max(ratios):.1f} "
        f"| {np.std(logs[0], ddof=1):.3f} | {np.std(logs[1], ddof=1):.3f} | {variance_ratio(logs[1], logs[0])} "
        f"| {evidence} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--runs", type=int, default=5, help="of each side, at least 3 (a variance is estimated)")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.runs < 3:
        parser.error("--runs must be at least 3")
    lm = LanguageModel.from_pretrained("smollm2", device=options.device, dtype=torch.float32)
    model = TiltedLM(lm.packed(), rewards.Sentiment(), BETA, max_new_tokens=options.tokens)
    peer = Peer(lm, options.tokens)
    peer.run(2, seed=0), ours(model, 2, seed=0)  # warm up
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.tokens} tokens,")
    print(f"{options.runs} runs of each side, {REQUIREMENTS[0]}\n")
    print(
        "| particles | genlm, tokens/s | bayeslm, tokens/s | ratio (median; min to max) | sd of log Ẑ, genlm "
        "| bayeslm | variance, bayeslm to genlm (95%) | log of mean Ẑ, genlm and bayeslm |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for particles in options.particles:
        pairs = []
        for seed in range(options.runs):
            pairs.append((peer.run(particles, seed), ours(model, particles, seed)))
            print(f"{particles} particles, run {seed}: {pairs[-1]}", file=sys.stderr)
        print(row(particles, *map(list, zip(*pairs, strict=True))), flush=True)


if __name__ == "__main__":
    main()
