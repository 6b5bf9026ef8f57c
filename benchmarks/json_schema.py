"""JSON of a schema by SmolLM2-135M, side by side: bayeslm's `SMC` with a `Grammar`, and genlm-control's AWRS, in turn.

    python benchmarks/json_schema.py [--particles 8 16 32] [--runs 5] [--tokens 40] [--schema person] [--out FILE]

The same on both sides: network (float32), torch and transformers (those of constraints.txt), threads, prompt, schema,
limit, and the target, the model's own distribution of whole texts, given that they are in the language and end, by a
token of the end, within the limit. bayeslm has masks of all tokens, and keeps the best texts of one token more, each
once (`resampling="optimal"`); genlm-control's adaptive weighted rejection sampling checks the tokens that it draws, its
documented way for schemas, and resamples below half the effective sample size. Its environment is that of
`genlm_control.py`.

The language is that of genlm-control's `JsonSchema`: keys in any order, and between the parts of a text spaces and at
most one line break. It also has texts with space after the last brace, which a second potential of genlm-control's side
removes (one brace opens, one closes, at the end): nearly all of the model's mass goes on with such space, nothing of it
ends after it, and no sampler knows Z then. llguidance's JSON schemas have the keys in the schema's order and any space;
so bayeslm is given the same language as a regular expression (`language`). Every text with weight is put to the other
library. genlm-control ends a text at the limit by force, with the weight of the end; bayeslm
counts a text that has not ended as one, so that here a factor removes it.

``--schema age`` is a smaller problem. ``city`` (one of three names) and ``home`` (that, and a first name by a pattern)
are those in which genlm-control's prefixes see at once what a text cannot become, so that both know Z well. A text is
valid where `json` parses it and `jsonschema` validates it; tokens are those of the final texts.

``--out`` appends each pair of runs to a file, and does not run what it holds: the same command with more ``--runs``
adds to them. A second table says how far log Z-hat (of runs whose Z-hat is above 0; and by its quartiles) and Z-hat
itself (its variance over its squared mean, zeros among them) spread over runs: genlm-control's, ours, and their ratio
with an interval of 95% by the bootstrap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import torch
from _figures import beside, log_mean, spreads
from _peer import Peer
from genlm_control import REQUIREMENTS

from bayeslm.inference import SMC, EvidenceError
from bayeslm.models import LanguageModel, TiltedLM, rewards

PROMPT = "Text: Maria Keller, who lives in Zurich, turned 34 last week.\nThe same as JSON with {}:\n"
CITIES = ["Zurich", "Geneva", "Basel"]
PROPERTIES = {
    "name": {"type": "string", "maxLength": 16},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "city": {"enum": CITIES},
    "first": {"type": "string", "pattern": r"^[A-Za-z]{1,8}\Z"},
}
SCHEMAS = {"person": ["name", "age"], "age": ["age"], "city": ["city"], "home": ["city", "first"]}  # the keys

SPACE = r" *(\n *)?"
ESCAPED = r'["\\/bfnrt]|u([0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})'
PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # one character beyond the basic plane
VALUES = {
    "name": rf'"([^"\\{{}}\x00-\x1f]|\\({ESCAPED})|{PAIR}){{0,16}}"',
    "age": r"-?0([eE][0-9]+)?|[1-9][0-9]?([eE]0+)?|1([01][0-9]|20)([eE]0+)?|([1-9]|1[012])[eE]0*1|1[eE]0*2",
    "city": f'"({"|".join(CITIES)})"',
    "first": r'"([A-Za-z]|\\u00([46][1-9a-fA-F]|[57][0-9aA])){1,8}"',
}


def schema_of(keys: list[str]) -> dict[str, Any]:
    properties = {key: PROPERTIES[key] for key in keys}
    return {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}


def language(keys: list[str]) -> str:
    """Return a regular expression of the texts that genlm-control's side accepts."""
    members = [f'"{key}"{SPACE}:{SPACE}({VALUES[key]})' for key in keys]
    orders = [f"{SPACE},{SPACE}".join(order) for order in itertools.permutations(members)]
    return rf"\{{{SPACE}({'|'.join(orders)}){SPACE}\}}"


def has_ended(prompts: list[str], completions: list[str], truncated: list[bool], **columns: Any) -> list[float]:
    return [-np.inf if cut else 0.0 for cut in truncated]


class Problem(NamedTuple):
    """The model's texts of a language, and the engine's proposal."""

    model: TiltedLM
    grammar: rewards.Grammar
    prompt: str
    schema: dict[str, Any]

    def is_valid(self, text: str) -> bool:
        try:
            jsonschema.validate(json.loads(text), self.schema)
        except (ValueError, jsonschema.ValidationError):
            return False
        return True


class Run(NamedTuple):
    seconds: float
    tokens: int
    log_evidence: float
    texts: list[str]  # that have weight


def theirs(peer: Peer, particles: int, seed: int) -> Run:
    return Run(**peer.ask({"particles": particles, "seed": seed}))


def ours(problem: Problem, particles: int, seed: int) -> Run:
    engine = SMC(particles, 1, twist=problem.grammar, resampling="optimal", seed=seed, progress=False)
    start = time.perf_counter()
    try:
        posterior = engine.run(problem.model, [problem.prompt])
    except EvidenceError:  # all particles have weight 0
        return Run(time.perf_counter() - start, 0, -np.inf, [])
    seconds = time.perf_counter() - start
    texts: list[Any] = posterior.texts["completion"][posterior.log_weights > -np.inf].tolist()
    return Run(seconds, int(posterior.lengths["completion"].sum()), float(posterior.log_evidence[0]), texts)


def check_languages(problem: Problem, peer: Peer, peers: list[Run], own: list[Run]) -> None:
    """Refuse a text with weight on one side that is not in the language of the other."""
    texts = [text for run in own for text in run.texts]
    outside = [text for text, ok in zip(texts, peer.ask({"texts": texts})["members"], strict=True) if not ok]
    texts = [text for run in peers for text in run.texts]
    scores = np.asarray(problem.grammar.score([], texts))
    outside += [text for text, score in zip(texts, scores, strict=True) if score < 0]
    if outside:
        sys.exit(f"the languages differ: {outside[:3]}")


def valid(problem: Problem, runs: list[Run]) -> str:
    texts = [text for run in runs for text in run.texts]
    return f"{sum(map(problem.is_valid, texts))} of {len(texts)}"


def pairs_of(path: Path | None, options: dict[str, Any]) -> dict[tuple[int, int], list[Run]]:
    """Return the pairs of runs that a file holds, by particles and seed, theirs first.

    :raises SystemExit: if they are of another problem.
    """
    found = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else []:
        kept = json.loads(line)
        if kept["problem"] != options:
            sys.exit(f"{path} holds runs of {kept['problem']}, not of {options}")
        found[kept["particles"], kept["seed"]] = [Run(*run) for run in kept["runs"]]
    return found


def alone(problem: Problem, particles: int, own: list[Run]) -> str:
    speed = statistics.median(run.tokens / run.seconds for run in own)
    logs = [run.log_evidence for run in own]
    mean, error = log_mean(logs)
    return (
        f"| {particles} | – | {valid(problem, own)} | – | {speed:.1f} | – | – | {np.std(logs, ddof=1):.3f} | – "
        f"| {mean:.2f} ± {error:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--runs", type=int, default=5, help="of each side, at least 3 (a variance is estimated)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the runs, whose seeds follow one another")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--schema", choices=SCHEMAS, default="person")
    parser.add_argument("--alone", action="store_true", help="bayeslm alone, without genlm-control's environment")
    parser.add_argument("--out", type=Path, help="a file that runs are kept in")
    options = parser.parse_args()
    if options.runs < 3:
        parser.error("--runs must be at least 3")
    keys = SCHEMAS[options.schema]
    lm = LanguageModel.from_pretrained("smollm2", dtype=torch.float32)
    grammar = rewards.Grammar(regex=language(keys))
    model = TiltedLM(lm.packed(), grammar + rewards.Reward(has_ended), beta=1.0, max_new_tokens=options.tokens)
    problem = Problem(model, grammar, PROMPT.format(" and ".join(keys)), schema_of(keys))
    peer = None if options.alone else Peer("genlm", REQUIREMENTS, "_genlm_json_worker.py")
    if peer is not None:
        question = {"model": lm.network.name_or_path, "prompt": lm.tokenizer(problem.prompt)["input_ids"]}
        settings = {"eos": lm.eos_token_ids, "tokens": options.tokens, "threads": torch.get_num_threads()}
        peer.send(question | settings | {"schema": problem.schema})
        theirs(peer, 2, seed=0)
    ours(problem, 2, seed=0)  # warm up
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, at most {options.tokens} tokens,")
    print(f"{options.runs} runs of each side, {REQUIREMENTS[0]}\n")
    print(
        "| particles | valid, genlm | bayeslm | genlm, tokens/s | bayeslm, tokens/s | ratio (median; min to max) "
        "| sd of log Ẑ, genlm | bayeslm | variance, bayeslm to genlm (95%) | log of mean Ẑ, genlm and bayeslm |"
    )
    print("|---" * 10 + "|")
    of = {"schema": options.schema, "tokens": options.tokens, "alone": options.alone}
    kept, spread = pairs_of(options.out, of), []
    for particles in options.particles:
        pairs = []
        for seed in range(options.first_seed, options.first_seed + options.runs):
            if (particles, seed) not in kept:
                own = ours(problem, particles, seed)
                kept[particles, seed] = [own if peer is None else theirs(peer, particles, seed), own]
                if options.out is not None:
                    record = {"problem": of, "particles": particles, "seed": seed, "runs": kept[particles, seed]}
                    with options.out.open("a") as file:
                        print(json.dumps(record), file=file)
            pairs.append(kept[particles, seed])
            print(f"{particles} particles, run {seed}: {pairs[-1]}", file=sys.stderr)
        peers, mine = map(list, zip(*pairs, strict=True))
        if peer is None:
            print(alone(problem, particles, mine), flush=True)
        else:
            check_languages(problem, peer, peers, mine)
            print(f"| {particles} | {valid(problem, peers)} | {valid(problem, mine)} {beside(peers, mine)}", flush=True)
            logs = [[run.log_evidence for run in runs] for runs in (peers, mine)]
            spread.append(f"| {particles} {spreads(*logs)}")
    if peer is not None:
        print(
            "\n| particles | Ẑ = 0, genlm | bayeslm | variance of log Ẑ, genlm, bayeslm: ratio (95%) "
            "| distance of the quartiles | relative variance of Ẑ |"
        )
        print("|---" * 6 + "|", *spread, sep="\n")


if __name__ == "__main__":
    main()
