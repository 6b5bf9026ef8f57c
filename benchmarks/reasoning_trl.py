"""Sums in written steps: accuracy after SVI and after TRL's GRPO, from the same prior, rewards and numbers of samples.

    python benchmarks/reasoning_trl.py [--steps 100] [--seeds 1]        (at most ten minutes)

The prior, the problems and the reward are those of `examples/reasoning.py`: a small Llama fitted to written solutions,
then 1 where the answer is right. Both sides take so many steps of 256 new samples, 16 of each of 16 problems. SVI is
`SVI()` with no setting but the numbers; GRPO has the best of three learning rates, by the accuracy on problems that
neither training nor the figures have. `_trl_reasoning_worker.py` says what TRL does; it lives in an environment of its
own, build/trl, made at the first run (1.5 GB).

Accuracies are of draws at temperature 1 and of the likeliest text (temperature 0.05), on held-out problems, with 95%
intervals over these; differences are paired by problem. The fitted prior is kept in build/reasoning.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peer import ROOT, Peer
from svi_trl import REQUIREMENTS

from bayeslm.inference import SVI
from bayeslm.models import LanguageModel, TiltedLM

sys.path.append(str(ROOT / "examples"))
import _sums as sums

PROMPTS, GENERATIONS = 16, 16  # of a step
RATES = (1e-4, 3e-4, 1e-3)


def accuracy(lm: LanguageModel, held_out: list[sums.Problem], draws: int, temperature: float) -> np.ndarray:
    """Return the share of right answers, a problem."""
    texts = lm.generate_texts(
        [q for q, _, _ in held_out], draws, max_new_tokens=sums.LONGEST, temperature=temperature, seed=1
    )
    right = [[sums.answer_of(x) == answer for x in own] for own, (_, _, answer) in zip(texts, held_out, strict=True)]
    return np.array(right).mean(1)


def interval(values: np.ndarray) -> str:
    """Return a mean in percent, and its interval of 95%."""
    middle, reach = 100 * values.mean(), 196 * values.std(ddof=1) / len(values) ** 0.5
    return f"{middle:.1f}; {middle - reach:.1f} to {middle + reach:.1f}"


def ours(prior: LanguageModel, known: list[sums.Problem], steps: int, seed: int) -> tuple[LanguageModel, float]:
    """Return the policy of `SVI`, and its seconds."""
    model = TiltedLM(prior, sums.RIGHT, sums.BETA, max_new_tokens=sums.LONGEST, subsample_size=PROMPTS)
    started = time.perf_counter()
    svi = SVI(steps, num_samples=1, num_prior_samples=0, seed=seed, progress=False)
    posterior = svi.run(model, [q for q, _, _ in known], answer=[a for _, _, a in known])
    return posterior.policy, time.perf_counter() - started


def theirs(
    prior: LanguageModel, known: list[sums.Problem], tuning: list[sums.Problem], options: Any, seed: int
) -> tuple[LanguageModel, float, str]:
    """Return the policy of GRPO with the best rate, its seconds, and the accuracies of all rates."""
    rng = random.Random(seed)
    order = [x for _ in range(1 + options.steps * PROMPTS // len(known)) for x in rng.sample(known, len(known))]
    order = order[: options.steps * PROMPTS]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        prior.save_pretrained(Path(folder) / "prior")
        for rate in options.rates:
            peer = Peer("trl", REQUIREMENTS, "_trl_reasoning_worker.py")
            trained = Path(folder) / f"{rate:g}"
            answer = peer.ask(
                {
                    "model": str(Path(folder) / "prior"),
                    "prompts": [q for q, _, _ in order],
                    "answers": [a for _, _, a in order],
                    "ids": prior.encode_prompts([order[0][0]]).rows()[0],
                    "pattern": sums.RIGHT.pattern,
                    "tokens": sums.LONGEST,
                    "beta": options.beta,
                    "steps": options.steps,
                    "batch": PROMPTS * GENERATIONS,
                    "generations": GENERATIONS,
                    "learning_rate": rate,
                    "folder": str(trained),
                    "seed": seed,
                    "threads": options.threads,
                }
            )
            peer.close()
            policy = LanguageModel.from_pretrained(trained)
            found.append((accuracy(policy, tuning, 4, 1.0).mean(), policy, answer["seconds"], rate))
            print(f"  GRPO, {rate:g}: {found[-1][0]:.3f} right of the tuning problems", file=sys.stderr, flush=True)
    best = max(found, key=lambda each: each[0])
    return best[1], best[2], f"{best[3]:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of 256 samples")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of GRPO, to choose from")
    parser.add_argument("--beta", type=float, default=0.0, help="of GRPO, whose default is 0")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    written, known, held_out, tuning = sums.splits(extra=100)
    prior = sums.fitted(written, ROOT / "build" / "reasoning")
    print(f"torch {torch.__version__}, {REQUIREMENTS[0]}, {options.steps} steps of {PROMPTS * GENERATIONS} samples")
    print("\n| seed | network | learning rate | a draw, percent (95%) | the likeliest text | seconds |")
    print("|---|---|---|---|---|---|")
    differences = []
    for seed in range(options.seeds):
        policies = {"prior": (prior, float("nan"), "")}
        policies["SVI, no setting"] = (*ours(prior, known, options.steps, seed), "found by itself")
        policies["TRL's GRPO"] = theirs(prior, known, tuning, options, seed)
        right = {name: accuracy(lm, held_out, 16, 1.0) for name, (lm, _, _) in policies.items()}
        for name, (lm, seconds, rate) in policies.items():
            likely = interval(accuracy(lm, held_out, 1, 0.05))
            print(f"| {seed} | {name} | {rate} | {interval(right[name])} | {likely} | {seconds:.0f} |", flush=True)
        differences.append(right["SVI, no setting"] - right["TRL's GRPO"])
    print(f"\nSVI less GRPO, of a draw, in percent: {interval(np.mean(differences, axis=0))}")


if __name__ == "__main__":
    main()
