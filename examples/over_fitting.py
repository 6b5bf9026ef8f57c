"""Over-fitting: a reward learned from few labels, few prompts to train on, and when to stop.

    python examples/over_fitting.py [--steps 24] [--beta 0.02]      (some four minutes on two cores)

The gold reward is a reader who likes praise and dislikes repetition. The reader labels some of SmolLM2's texts, of
which a linear reward of word counts is inferred: the proxy. `SVI` trains a policy for the proxy on four prompts, with
so small a beta that little holds it at the prior. Every few steps `HeldOut` draws from the policy, on the prompts of
the training and on others, and has both rewards of the same draws: the program is tilted by the proxy
(`rewards.factor`) and only records the gold one (`rewards.record`). There are two ways to fit too much: the proxy grows
more on the prompts of the training than on others, and the gold reward falls while the proxy grows. The step at which
to stop is that of the highest gold reward on validation prompts; what it is worth is said on test prompts, which chose
nothing. examples/over_optimisation.py has the same question without prompts, steps and sampling errors, by enumeration.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from _figures import count, parser, positive, table, with_error, write

from bayeslm import DiagnosticsWarning
from bayeslm.inference import SVI, ImportanceSampling, Laplace
from bayeslm.inference.training import Adam, AutoPolicy, HeldOut, ReverseKL, StepRecord
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.preferences import GaussianRatings, Ratings, UncertainReward
from bayeslm.plots import COLOURS, PRIOR_COLOUR

PROMPTS = {
    "training": ["My dinner at the restaurant was", "The new phone", "Our hotel room", "I watched the film and"],
    "validation": ["The concert last night", "My flight to Rome", "The book", "Our guide"],
    "test": ["The breakfast", "My new shoes", "The train ride", "Her speech"],
}
TOKENS = 10
REPETITION = 1.5  # what the reader subtracts for a text that is all repetition


def repeated(completions: list[str], **columns: Any) -> list[float]:
    """Return the share of words that have come before in the text."""
    words = [text.lower().split() for text in completions]
    return [1 - len(set(each)) / len(each) if each else 0.0 for each in words]


gold = rewards.Sentiment() - REPETITION * rewards.Reward(repeated, lower_bound=0.0, upper_bound=1.0)


def word_counts(texts: list[str]) -> Callable[[list[str], list[str]], torch.Tensor]:
    """Return features: the numbers of those words that two or more of the texts have, in their standard deviations."""
    in_texts = Counter(word for text in texts for word in set(text.lower().split()))
    words = {word: i for i, word in enumerate(sorted(w for w, n in in_texts.items() if n > 1))}

    def counts(prompts: list[str], completions: list[str]) -> torch.Tensor:
        found = torch.zeros(len(completions), len(words))
        for row, text in zip(found, completions, strict=True):
            for word in text.lower().split():
                if word in words:
                    row[words[word]] += 1
        return found

    spread = counts([], texts).std(0)
    return lambda prompts, completions: counts(prompts, completions) / spread


def learned(lm: LanguageModel, num_labels: int) -> UncertainReward:
    """Return the proxy: the mean of what is inferred of the gold reward from the labels of draws of the prior."""
    prompts = PROMPTS["training"]
    run = ImportanceSampling(-(-num_labels // len(prompts)), seed=5)
    drawn = run.run(TiltedLM(lm, None, max_new_tokens=TOKENS), prompts).texts["completion"][0]
    texts = drawn.ravel().tolist()
    labels = gold(np.array(prompts, dtype=object), drawn).ravel().tolist()
    reader = GaussianRatings(word_counts(texts))
    posterior = Laplace(200, seed=0).run(reader, Ratings(prompts * len(drawn), texts, labels))
    return UncertainReward.from_posterior(reader, posterior, "mean", seed=0)


def program(lm: LanguageModel, proxy: rewards.Reward, beta: float, prompts: list[str]) -> None:
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", lm(prompts, max_new_tokens=TOKENS))
        texts = lm.decode(x)
        rewards.factor("proxy", proxy(prompts, texts), beta)
        rewards.record("gold", gold(prompts, texts))


Curves = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]  # by prompts and reward: means and errors (evaluation,)


def curves(stats: dict[str, Any]) -> Curves:
    """Return means over prompts, with the standard errors that the draws give them."""
    found: Curves = {}
    for name in PROMPTS:
        found[name] = {"KL": (stats[f"{name}_kl"][0].mean(-1), np.zeros(len(stats["held_out_steps"])))}
        for reward in ("proxy", "gold"):
            means, errors = (stats[f"{name}_reward_{reward}{end}"][0] for end in ("", "_stderr"))
            found[name][reward] = means.mean(-1), np.sqrt(np.square(errors).sum(-1)) / errors.shape[-1]
    return found


def picture(steps: np.ndarray, found: Curves, stop: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
    for name, style in {"training": "--", "test": "-"}.items():
        for reward, colour in {"proxy": COLOURS[1], "gold": COLOURS[0]}.items():
            means, errors = found[name][reward]
            for axis, at in zip(axes, (steps, found[name]["KL"][0]), strict=True):
                label = f"{reward}, {name} prompts"
                axis.errorbar(at, means, errors, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    axes[0].axvline(steps[stop], color=PRIOR_COLOUR, linestyle=":", label="stop: best gold on validation prompts")
    axes[0].set(xlabel="step of the training", ylabel="reward, ± one standard error")
    axes[1].set(xlabel="KL(policy ‖ prior), nats a text")
    axes[1].set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    axes[1].set_xlim(left=0.0)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None, lm: LanguageModel | None = None) -> tuple[np.ndarray, Curves]:
    options = parser(__doc__, "over_fitting")
    options.add_argument("--steps", type=count, default=24, help="of the training")
    options.add_argument("--beta", type=positive, default=0.02, help="the KL coefficient")
    options.add_argument("--labels", type=count, default=96, help="texts that the reader labels")
    chosen = options.parse_args(arguments)
    steps, labels, draws = (2, 24, 2) if chosen.quick else (chosen.steps, chosen.labels, 8)
    warnings.simplefilter("ignore", DiagnosticsWarning)  # beta is too small on purpose
    started = time.perf_counter()
    lm = lm or LanguageModel.from_pretrained("smollm2")
    proxy = learned(lm.packed(), labels)
    held_out = HeldOut(
        {name: partial(program, lm, proxy, chosen.beta, prompts) for name, prompts in PROMPTS.items()},
        every=max(1, steps // 6),
        num_particles=draws,
    )
    last = deque[StepRecord](maxlen=1)  # the posterior is of the best policy
    svi = SVI(
        steps,
        objective=ReverseKL(2 if chosen.quick else 4),
        optimizer=Adam(3e-3, schedule="constant"),
        guide=partial(AutoPolicy, lora_rank=4 if lm.name else "auto"),
        callbacks=[held_out, last.append],
        num_samples=2,  # the curves say it all
        num_prior_samples=0,
        seed=0,
    )
    stats = svi.run(program, lm, proxy, chosen.beta, PROMPTS["training"]).stats
    texts = lm.decode(last[0].particles.values["completion"])[0]
    at, found = stats["held_out_steps"], curves(stats)
    stop = int(np.argmax(found["validation"]["gold"][0]))
    lines = [f"{labels} labels; beta {chosen.beta}; {draws} draws of each prompt, ± standard errors over draws", ""]
    columns = {"prior": 0, f"stopped after {at[stop]} steps": stop, f"after {at[-1]} steps": -1}
    cells = {
        f"{reward}, {name} prompts": [with_error(*(x[i] for x in found[name][reward])) for i in columns.values()]
        for name in ("training", "test")
        for reward in ("proxy", "gold")
    }
    cells["KL to the prior, test prompts"] = [
        f"{round(found['test']['KL'][0][i], 2) + 0.0:.2f}" for i in columns.values()
    ]
    lines += [*table(cells, ["", *columns]), "", "texts of the end:", *texts.tolist()]
    write(chosen.folder, lines, started)
    picture(at, found, stop, chosen.folder / "over-fitting.png")
    return at, found


if __name__ == "__main__":
    main()
