"""Sums by SmolLM2: problems and scores of reasoning-gym, self-consistency, a power of the prior, and `SVI`.

    python examples/reasoning_smollm2.py [--folder runs/reasoning_smollm2]        (five minutes of two cores)

reasoning-gym (`pip install "bayeslm[reasoning]"`) writes problems and scores answers: a verifiable reward. Here these
are "chain_sum" problems of two numbers of one digit, after three solved ones in the prompt, so that
SmolLM2-135M-Instruct answers in a few tokens, up to the end of the line.

Figures are of problems held out, means with standard errors over them: the probability of the right answer, and whether
the answer of most weight is right (`posterior.decide`), for draws of the prior, of p^alpha by SMC with as many
particles, and of the policy that `SVI()` trains on other problems.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from _figures import count, mean, parser, stderr, table, write

from bayeslm.decisions import SameAnswer
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.sequential import Power
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.posterior import DiagnosticsWarning

TRAIN, HELD_OUT, DRAWS, STEPS = 60, 48, 12, 20
BETA, ALPHA, LONGEST = 0.25, 4.0, 6
SHOWN = 3  # solved problems in the prompt


def problems(size: int, seed: int = 0) -> tuple[list[dict[str, Any]], Any]:
    """Return different problems, the first of them solved in the column ``prompt``, and the gym that scores answers."""
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        sys.exit('this script needs reasoning-gym, of an extra: pip install "bayeslm[reasoning]"')
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    gym = create_dataset("chain_sum", size=4 * (size + SHOWN), seed=seed, **sizes)
    entries = list({entry["question"]: entry for entry in gym}.values())[: size + SHOWN]
    sums = [entry["question"].rsplit(": ", 1)[-1] for entry in entries]  # "4 + 3 ="
    shown = "".join(f"{x} {entry['answer']}\n" for x, entry in zip(sums[:SHOWN], entries, strict=False))
    return [{"prompt": shown + x, "entry": e} for x, e in zip(sums[SHOWN:], entries[SHOWN:], strict=True)], gym


def answer_of(text: str) -> str | None:
    """Return the number that a line holds."""
    found = re.fullmatch(r"\s*(-?\d+)\s*", text)
    return found[1] if found else None


def draw_picture(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for i, (name, values) in enumerate(found.items()):
        heights, errors = ([100 * f(each) for each in values] for f in (np.mean, stderr))
        axes.bar(np.arange(2) + 0.27 * i, heights, 0.25, yerr=errors, capsize=3, label=name)
    axes.set_xticks(np.arange(2) + 0.27, ["a draw", f"the answer of {DRAWS} draws"])
    axes.set(ylabel="percent right, ± one standard error", title=f"{HELD_OUT} held-out problems", ylim=(0, 100))
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None, lm: LanguageModel | None = None) -> list[str]:
    options = parser(__doc__, "reasoning_smollm2")
    options.add_argument("--steps", type=count, default=STEPS, help="of the training")
    chosen = options.parse_args(arguments)
    quick, started = chosen.quick, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws, from which an answer is chosen
    lm = lm or LanguageModel.from_pretrained("smollm2")
    every, gym = problems(12 if quick else TRAIN + HELD_OUT)
    train, held_out = (every[:8], every[8:]) if quick else (every[:TRAIN], every[TRAIN:])
    prompts, entries = [row["prompt"] for row in held_out], [row["entry"] for row in held_out]
    print(f"a prompt: {prompts[0]!r}")

    def right(completions: list[str], entry: list[dict[str, Any]], **columns: object) -> list[float]:
        """1 where an answer is right; the gym itself gives parts of it to wrong ones."""
        pairs = zip(map(answer_of, completions), entry, strict=True)
        return [float(gym.score_answer(answer, e) == 1.0) for answer, e in pairs]

    settings = {"max_new_tokens": LONGEST, "stop": "\n"}
    svi = SVI(2 if quick else chosen.steps, 8, num_samples=1, num_prior_samples=0, seed=0)
    policy = svi.run(TiltedLM(lm, right, BETA, subsample_size=4, **settings), train).policy
    prior, policy = lm.packed(), policy.packed()
    plain, smc = ImportanceSampling(DRAWS, 1, seed=0), SMC(DRAWS, 1, twist=Power(ALPHA), seed=0)
    runs = {
        "prior": (plain, prior, 1.0),
        f"prior, power {ALPHA:g}": (smc, prior, ALPHA),
        "policy": (plain, policy, 1.0),
    }
    rows, found = {}, {}
    for name, (engine, network, power) in runs.items():
        posterior = engine.run(TiltedLM(network, None, power=power, **settings), prompts)
        texts = posterior.texts["completion"]  # (chain, draw, prompt)
        hits = np.array(right(texts.ravel().tolist(), entries * DRAWS)).reshape(texts.shape)
        decided = np.array(right(posterior.decide(SameAnswer(answer_of)).texts, entries))
        tokens = posterior.stats["tokens"] / len(prompts)
        weight = (hits * posterior.weights()).sum((0, 1))
        found[name] = weight, decided
        rows[name] = [mean(100 * weight, 1), mean(100 * decided, 1), f"{tokens:.0f}"]
    lines = table(rows, ["percent right", "a draw", f"the answer of {DRAWS} draws", "tokens a problem for them"])
    write(chosen.folder, lines, started)
    draw_picture(chosen.folder / "reasoning-smollm2.png", found)
    return lines


if __name__ == "__main__":
    main()
