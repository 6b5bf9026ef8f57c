"""Reasoning in written steps: a small transformer learns sums from examples, and then from being right.

    python examples/reasoning.py [--folder runs/reasoning]

A problem is a sum of five numbers, and the text that solves it writes a step at a time: "7+8+4+9+6 = 15+4+9+6 =
19+9+6 = 28+6 : 34" (a digit is a token). Some problems come with written solutions, others with an answer alone, and
others are held out. What is learned from them, each beginning with the prior:

    prior       a Llama of 84,000 weights, fitted to written solutions (`LanguageModel.fit`)
    SVI         the likelihood exp(r / beta), r = 1 where the answer is right, on problems with answers (`SVI()`)
    EM          the steps are latent and the answer is observed: steps are drawn from their posterior given the answer
                (`ImportanceSampling`), and the network is fitted to them
    no training p^alpha, by `SMC(twist=Power(alpha))`, and the answer that most draws have (`posterior.decide`)

The figures are accuracies on the held-out problems, with standard errors over them. The fitted prior and the training
are kept in the folder, and the next call goes on from there.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
from _figures import mean, parser, stderr, table, write
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


def em(prior: LanguageModel, known: list[Problem], rounds: int, num_steps: int) -> LanguageModel:
    """Return the network after rounds of expectation (draws of the steps given the answer) and maximisation."""
    lm = prior.policy()
    questions, _, answers = (list(column) for column in zip(*known, strict=True))
    for i in range(rounds):
        posterior = ImportanceSampling(8, 1, seed=i).run(partial(explained, lm), questions, answers)
        steps = posterior.resample(4, seed=i).texts["steps"][0]  # (draw, prompt)
        written = [f"{x} {answer}" for draw in steps for x, answer in zip(draw, answers, strict=True)]
        lm.fit(written, 4 * questions, num_steps=num_steps, batch_size=64, learning_rate=1e-3, seed=i)
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


def draw_picture(
    path: Path, history: dict[str, np.ndarray], curves: dict[str, tuple[list[float], list[np.ndarray]]]
) -> None:
    from matplotlib import pyplot

    figure, (left, middle) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    left.plot(history["reward"][0].mean(-1), color="0.7", label="problems it learns from")
    left.plot(history["held_out_steps"], BETA * history["held_out_log_likelihood"][0].mean(-1), "o-", label="held out")
    left.set(title="SVI", xlabel="step", ylabel="accuracy of a draw", ylim=(0, 1))
    for name, (tokens, decisions) in curves.items():
        errors = [stderr(x) for x in decisions]
        middle.errorbar(tokens, [x.mean() for x in decisions], errors, marker="o", capsize=2, label=name)
    middle.set(title="the answer that most draws have, held out", xlabel="tokens a problem", xscale="log")
    for axes in (left, middle):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[str]:
    options = parser(__doc__, "reasoning")
    options.add_argument("--steps", type=int, default=STEPS, help="of the training")
    chosen = options.parse_args(arguments)
    folder, quick, started = chosen.folder, chosen.quick, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws, from which an answer is chosen
    written, known, held_out, _ = splits(quick=quick)
    print("for example:", " ".join(held_out[0]))
    prior = fitted(written, folder / "fit", quick=quick)

    questions, _, answers = (list(column) for column in zip(*known, strict=True))
    model = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST, subsample_size=4 if quick else 16)
    unseen = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST)
    shown = [list(column) for column in zip(*held_out[:50], strict=True)]
    watch = HeldOut({"held_out": partial(unseen, shown[0], answer=shown[2])}, every=20, num_particles=4)
    settings = {"callbacks": [watch], "checkpoint": folder / "svi", "num_samples": 1, "num_prior_samples": 0, "seed": 0}
    trained = SVI(2 if quick else chosen.steps, **settings).run(model, questions, answer=answers)
    learned = em(prior, known, 1 if quick else 4, 2 if quick else 50)

    draws = [2] if quick else [1, 4, 16]
    models = {"prior": (prior, 1.0), f"prior, power {ALPHA:g}": (prior, ALPHA)}
    models |= {"EM": (learned, 1.0), "SVI": (trained.policy, 1.0)}
    curves, rows = {}, {}
    for name, (lm, alpha) in models.items():
        accuracy, decisions, tokens = evaluate(lm, held_out, draws, alpha)
        curves[name] = tokens, decisions
        rows[name] = [mean(100 * accuracy, 1), mean(100 * decisions[-1], 1), f"{tokens[-1]:.0f}"]
    head = ["percent right", "a draw", f"the answer of {draws[-1]} draws", "tokens a problem for them"]
    lines = table(rows, head)
    write(folder, lines, started)
    draw_picture(folder / "reasoning.png", trained.stats, curves)
    trained.policy.save_pretrained(folder / "policy")
    return lines


if __name__ == "__main__":
    main()
