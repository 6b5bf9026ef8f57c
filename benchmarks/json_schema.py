"""JSON of a schema by SmolLM2-135M, side by side: bayeslm's `SMC` with a `Grammar`, and genlm-control's AWRS, in turn.

    python benchmarks/json_schema.py [--particles 8 16 32] [--runs 5] [--tokens 40]

The same on both sides: network (float32), torch and transformers (those of constraints.txt), threads, prompt, schema,
limit, resampling below half the effective sample size, and the target, the model's own distribution of whole texts,
given that they are valid. bayeslm draws from masks of all tokens; genlm-control's adaptive weighted rejection sampling
checks the tokens that it draws, its documented way for schemas. Its environment is that of `genlm_control.py`. The two
differ in the space that they allow between the parts of a text, so their Z may differ (last column).

A text with weight is valid where `json` parses it and `jsonschema` validates it; tokens are those of the final texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import torch
from _figures import beside, log_mean
from _peer import Peer
from genlm_control import REQUIREMENTS

from bayeslm.inference import SMC
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "Text: Maria Keller, who lives in Zurich, turned 34 last week.\nThe same as JSON with name and age:\n"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Run(NamedTuple):
    seconds: float
    tokens: int
    log_evidence: float
    texts: list[str]  # that have weight

    @property
    def valid(self) -> int:
        return sum(is_valid(text) for text in self.texts)


def is_valid(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def theirs(peer: Peer, particles: int, seed: int) -> Run:
    return Run(**peer.ask({"particles": particles, "seed": seed}))


def ours(model: TiltedLM, grammar: rewards.Grammar, particles: int, seed: int) -> Run:
    engine = SMC(particles, 1, twist=grammar, seed=seed, progress=False)
    start = time.perf_counter()
    posterior = engine.run(model, [PROMPT])
    seconds = time.perf_counter() - start
    texts: list[Any] = posterior.texts["completion"][posterior.log_weights > -np.inf].tolist()
    return Run(seconds, int(posterior.lengths["completion"].sum()), float(posterior.log_evidence[0]), texts)


def row(particles: int, peers: list[Run], own: list[Run]) -> str:
    valid = [f"{sum(run.valid for run in runs)} of {sum(len(run.texts) for run in runs)}" for runs in (peers, own)]
    return f"| {particles} | {valid[0]} | {valid[1]} {beside(peers, own)}"


def alone(particles: int, own: list[Run]) -> str:
    valid = f"{sum(run.valid for run in own)} of {sum(len(run.texts) for run in own)}"
    speed = statistics.median(run.tokens / run.seconds for run in own)
    logs = [run.log_evidence for run in own]
    mean, error = log_mean(logs)
    return (
        f"| {particles} | – | {valid} | – | {speed:.1f} | – | – | {np.std(logs, ddof=1):.3f} | – "
        f"| {mean:.2f} ± {error:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--runs", type=int, default=5, help="of each side, at least 3 (a variance is estimated)")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--alone", action="store_true", help="bayeslm alone, without genlm-control's environment")
    options = parser.parse_args()
    if options.runs < 3:
        parser.error("--runs must be at least 3")
    lm = LanguageModel.from_pretrained("smollm2", dtype=torch.float32)
    grammar = rewards.Grammar(json_schema=SCHEMA)
    model = TiltedLM(lm.packed(), grammar, beta=1.0, max_new_tokens=options.tokens)
    peer = None if options.alone else Peer("genlm", REQUIREMENTS, "_genlm_json_worker.py")
    if peer is not None:
        problem = {"model": lm.network.name_or_path, "prompt": lm.tokenizer(PROMPT)["input_ids"], "schema": SCHEMA}
        settings = {"eos": lm.eos_token_ids, "tokens": options.tokens, "threads": torch.get_num_threads()}
        peer.send(problem | settings)
        theirs(peer, 2, seed=0)
    ours(model, grammar, 2, seed=0)  # warm up
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, at most {options.tokens} tokens,")
    print(f"{options.runs} runs of each side, {REQUIREMENTS[0]}\n")
    print(
        "| particles | valid, genlm | bayeslm | genlm, tokens/s | bayeslm, tokens/s | ratio (median; min to max) "
        "| sd of log Ẑ, genlm | bayeslm | variance, bayeslm to genlm (95%) | log of mean Ẑ, genlm and bayeslm |"
    )
    print("|---" * 10 + "|")
    for particles in options.particles:
        pairs = []
        for seed in range(options.runs):
            own = ours(model, grammar, particles, seed)
            pairs.append((own if peer is None else theirs(peer, particles, seed), own))
            print(f"{particles} particles, run {seed}: {pairs[-1]}", file=sys.stderr)
        peers, mine = map(list, zip(*pairs, strict=True))
        print(alone(particles, mine) if peer is None else row(particles, peers, mine), flush=True)


if __name__ == "__main__":
    main()
