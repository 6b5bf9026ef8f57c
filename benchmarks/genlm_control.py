"""Sequential Monte Carlo on SmolLM2-135M, side by side: bayeslm's `SMC` and genlm-control, in turn.

    python benchmarks/genlm_control.py [--particles 8 16 32 64] [--runs 5] [--tokens 24]

The same on both sides: network (float32), torch and transformers (those of constraints.txt), threads, prompt, target
p(x) exp(r(x) / beta) with r VADER's sentiment and beta = 0.1, intermediate targets (the sentiment of the text so far),
proposal (the prior), systematic resampling below half the effective sample size. A text that reaches the limit is
weighed like one that ends earlier, so that both estimate the same Z (last column). Each runs at its
best settings for this network: bayeslm's weights are packed; `_genlm_worker.py` says what genlm-control's are. It lives
in an environment of its own, build/genlm, made at the first run (about 2 GB), and is driven through pipes; loading the
networks, and packing ours, is not timed.

Tokens are those of the final texts, on both sides. On a GPU genlm-control advises vLLM, which this does not install.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NamedTuple

import torch
from _figures import beside
from _peer import Peer

from bayeslm.inference import SMC
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "My dinner at the restaurant was"
BETA = 0.1
REQUIREMENTS = [
    "genlm-control==0.4.1",
    "genlm-backend==0.3.1",
    "genlm-bytes==0.2.0",
    "genlm-grammar==0.2.0",
    "vaderSentiment",
]


class Run(NamedTuple):
    seconds: float
    tokens: int
    log_evidence: float


def theirs(peer: Peer, particles: int, seed: int) -> Run:
    return Run(**peer.ask({"particles": particles, "seed": seed}))


def ours(model: TiltedLM, particles: int, seed: int) -> Run:
    engine = SMC(particles, 1, twist="partial", resampling="systematic", seed=seed, progress=False)
    start = time.perf_counter()
    posterior = engine.run(model, [PROMPT])
    seconds = time.perf_counter() - start
    return Run(seconds, int(posterior.lengths["completion"].sum()), float(posterior.log_evidence[0]))


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
    peer = Peer("genlm", REQUIREMENTS, "_genlm_worker.py")
    peer.send(
        {
            "model": lm.network.name_or_path,
            "prompt": lm.tokenizer(PROMPT)["input_ids"],
            "eos": lm.eos_token_ids,
            "beta": BETA,
            "tokens": options.tokens,
            "device": str(lm.device),
            "threads": torch.get_num_threads(),
        }
    )
    theirs(peer, 2, seed=0), ours(model, 2, seed=0)  # warm up
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
            pairs.append((theirs(peer, particles, seed), ours(model, particles, seed)))
            print(f"{particles} particles, run {seed}: {pairs[-1]}", file=sys.stderr)
        print(f"| {particles} {beside(*zip(*pairs, strict=True))}", flush=True)


if __name__ == "__main__":
    main()
