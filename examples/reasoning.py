"""Reasoning in written steps: a small transformer learns sums from examples, and then from being right.

    python examples/reasoning.py [--folder runs/reasoning] [--seeds 1]

A problem is a sum of five numbers, and the text that solves it writes a step at a time: "7+8+4+9+6 = 15+4+9+6 =
19+9+6 = 28+6 : 34" (a digit is a token). Some problems come with written solutions, others with an answer alone, and
others are held out. What is learned from them, each beginning with the prior:

    prior       a Llama of 84,000 weights, fitted to written solutions (`LanguageModel.fit`)
    SVI         the likelihood exp(r / beta), r = 1 where the answer is right, on problems with answers (`SVI()`)
    EM          the steps are latent and the answer is observed: steps are drawn from their posterior given the answer
                (`ImportanceSampling`), and the network is fitted to them
    no training p^alpha, by `SMC(twist=Power(alpha))`, and the answer that most draws have (`posterior.decide`)

The figures are accuracies on the held-out problems, with standard errors over them, or over seeds: a further seed is
other problems, another prior and other trainings. The fitted priors and the trainings are kept in the folder, and the
next call goes on from there.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
from _figures import count, mean, over_seeds, parser, stderr, table, write
from _sums import BETA, LONGEST, RIGHT, Problem, answer_of, fitted, splits

from bayeslm import Posterior
from bayeslm.decisions import SameAnswer
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.sequential import Power
from bayeslm.inference.training import HeldOut
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.posterior import DiagnosticsWarning

ALPHA, STEPS = 4.0, 150


# -- a latent rationale --------------------------------------------------------------------------------------------


def explained(lm: LanguageModel, questions: list[str], answers: list[str]) -> None:
    """Steps, which are latent, then the answer, which is observed."""
    with pyro.plate("prompts", len(questions)):
        steps = pyro.sample("steps", lm(questions, LONGEST - 3, stop=":"))
        pyro.sample("answer", lm(lm.join(questions, steps), 3), obs=lm.encode(answers, 3))


def em(prior: LanguageModel, known: list[Problem], rounds: int, num_steps: int, seed: int) -> LanguageModel:
    """Return the network after rounds of expectation (draws of the steps given the answer) and maximisation."""
    lm = prior.policy()
    questions, _, answers = (list(column) for column in zip(*known, strict=True))
    for i in range(rounds):
        posterior = ImportanceSampling(8, 1, seed=seed + i).run(partial(explained, lm), questions, answers)
        steps = posterior.resample(4, seed=seed + i).texts["steps"][0]  # (draw, prompt)
        written = [f"{x} {answer}" for draw in steps for x, answer in zip(draw, answers, strict=True)]
        lm.fit(written, 4 * questions, num_steps=num_steps, batch_size=64, learning_rate=1e-3, seed=seed + i)
    return lm


# -- figures -------------------------------------------------------------------------------------------------------


def decided(posterior: Posterior, answers: list[str]) -> np.ndarray:
    """Return whether the answer of most weight is right, a problem."""
    texts = posterior.decide(SameAnswer(answer_of)).texts
    return np.array([answer_of(text) == answer for text, answer in zip(texts, answers, strict=True)], dtype=float)


def right(posterior: Posterior, answers: list[str]) -> np.ndarray:
    """Return the probability of the right answer, by the weights of the draws, a problem."""
    texts = posterior.texts["completion"]  # (chain, draw, prompt)
    hits = np.vectorize(answer_of, otypes=[object])(texts) == np.array(answers, dtype=object)
    return (hits * posterior.weights()).sum((0, 1))


def evaluate(
    lm: LanguageModel, held_out: list[Problem], draws: list[int], alpha: float = 1.0
) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """Return the accuracy of draws (problem,), and of decisions by so many draws each, with their tokens a problem.

    :param alpha: the power of the language model, by SMC.
    """
    questions, _, answers = (list(column) for column in zip(*held_out, strict=True))
    target = TiltedLM(lm, None, max_new_tokens=LONGEST, power=alpha)
    decisions, tokens = [], []
    for n in draws:
        engine = ImportanceSampling(n, 1, seed=0) if alpha == 1.0 else SMC(n, 1, twist=Power(alpha), seed=0)
        posterior = engine.run(target, questions)
        decisions.append(decided(posterior, answers))
        tokens.append(posterior.stats["tokens"] / len(questions))
    return right(posterior, answers), decisions, tokens


class Run(NamedTuple):
    """What a seed gives: the stats of SVI's training, and of each model accuracies of a draw and of decisions.

    :param accuracy: of a draw (problem,).
    :param decisions: by the answer that most draws have, for each number of draws (problem,).
    :param tokens: a problem, for each number of draws.
    """

    stats: dict[str, Any]
    accuracy: dict[str, np.ndarray]
    decisions: dict[str, list[np.ndarray]]
    tokens: dict[str, list[float]]


def one_seed(seed: int, draws: list[int], steps: int, folder: Path, quick: bool) -> Run:
    """Learn in all ways, and evaluate on the held-out problems; the folder keeps the prior and the policy."""
    written, known, held_out, _ = splits(quick=quick, seed=seed)
    print("for example:", " ".join(held_out[0]))
    prior = fitted(written, folder / "fit", quick=quick, seed=seed)

    questions, _, answers = (list(column) for column in zip(*known, strict=True))
    model = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST, subsample_size=4 if quick else 16)
    unseen = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST)
    shown = [list(column) for column in zip(*held_out[:50], strict=True)]
    watch = HeldOut({"held_out": partial(unseen, shown[0], answer=shown[2])}, every=20, num_particles=4)
    settings = {"callbacks": [watch], "checkpoint": folder / "svi", "num_samples": 1, "num_prior_samples": 0}
    trained = SVI(steps, **settings, seed=seed).run(model, questions, answer=answers)
    trained.policy.save_pretrained(folder / "policy")
    learned = em(prior, known, 1 if quick else 4, 2 if quick else 50, seed)

    run = Run(trained.stats, {}, {}, {})
    models = {"prior": (prior, 1.0), f"prior, power {ALPHA:g}": (prior, ALPHA)}
    models |= {"EM": (learned, 1.0), "SVI": (trained.policy, 1.0)}
    for name, (lm, alpha) in models.items():
        run.accuracy[name], run.decisions[name], run.tokens[name] = evaluate(lm, held_out, draws, alpha)
    return run


def draw_picture(path: Path, runs: list[Run], draws: list[int]) -> None:
    from matplotlib import pyplot

    figure, (left, middle) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for i, run in enumerate(runs):  # a line a seed
        names = ("problems it learns from", "held out") if i == 0 else (None, None)
        left.plot(run.stats["reward"][0].mean(-1), color="0.8", label=names[0])
        accuracy = BETA * run.stats["held_out_log_likelihood"][0].mean(-1)
        left.plot(run.stats["held_out_steps"], accuracy, "o-", color="C0", label=names[1])
    left.set(title="SVI", xlabel="step", ylabel="accuracy of a draw", ylim=(0, 1))
    for name in runs[0].accuracy:
        tokens = np.mean([run.tokens[name] for run in runs], 0)
        decided = [over_seeds([run.decisions[name][i] for run in runs]) for i in range(len(draws))]
        errors = [stderr(x) for x in decided]
        middle.errorbar(tokens, [x.mean() for x in decided], errors, marker="o", capsize=2, label=name)
    middle.set(title="the answer that most draws have, held out", xlabel="tokens a problem", xscale="log")
    for axes in (left, middle):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[str]:
    options = parser(__doc__, "reasoning")
    options.add_argument("--steps", type=count, default=STEPS, help="of the training")
    options.add_argument(
        "--seeds", type=count, default=1, help="of problems, prior and training; errors are over these"
    )
    chosen = options.parse_args(arguments)
    quick, started = chosen.quick, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws, from which an answer is chosen
    draws, steps = ([2], 2) if quick else ([1, 4, 16], chosen.steps)
    runs = [one_seed(seed, draws, steps, chosen.folder / f"seed-{seed}", quick) for seed in range(chosen.seeds)]
    rows = {}
    for name in runs[0].accuracy:
        found = (
            over_seeds([run.accuracy[name] for run in runs]),
            over_seeds([run.decisions[name][-1] for run in runs]),
        )
        tokens = np.mean([run.tokens[name][-1] for run in runs])
        rows[name] = [*(mean(100 * values, 1) for values in found), f"{tokens:.0f}"]
    head = ["percent right", "a draw", f"the answer of {draws[-1]} draws", "tokens a problem for them"]
    lines = table(rows, head)
    write(chosen.folder, lines, started)
    draw_picture(chosen.folder / "reasoning.png", runs, draws)
    return lines


if __name__ == "__main__":
    main()
