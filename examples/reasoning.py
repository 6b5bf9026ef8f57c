"""Reasoning in written steps: a small transformer learns sums from examples, and then from being right.

    python examples/reasoning.py [folder] [--quick]        (some three minutes of two cores)

A problem is a sum of five numbers, and the text that solves it writes a step at a time: "7+8+4+9+6 = 15+4+9+6 =
19+9+6 = 28+6 : 34" (a digit is a token). Some problems come with written solutions, others with an answer alone, and
others are held out. What is learned from them, each beginning with the prior:

    prior       a Llama of 84,000 weights, fitted to written solutions (`LanguageModel.fit`)
    SVI         the likelihood exp(r / beta), r = 1 where the answer is right, on problems with answers (`SVI()`)
    EM          the steps are latent and the answer is observed: steps are drawn from their posterior given the answer
                (`ImportanceSampling`), and the network is fitted to them
    no training p^alpha, by `SMC(twist=Power(alpha))`, and the answer that most draws have (`posterior.decide`)

The figures are accuracies on the held-out problems, with standard errors over them. Everything is written into the
folder (default: runs/reasoning), where the fitted prior is found again by the next call.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslm import Posterior
from bayeslm.decisions import SameAnswer
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.inference.sequential import Power
from bayeslm.inference.training import HeldOut
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import word_tokenizer
from bayeslm.posterior import DiagnosticsWarning

WORDS = ["<eos>", *"0123456789", "+", "=", ":"]
LONGEST, BETA, ALPHA = 24, 0.25, 4.0
WRITTEN, KNOWN, HELD_OUT = 3000, 400, 200  # problems
TERMS, WIDTH, FIT_STEPS, STEPS = 5, 64, 500, 150
RIGHT = rewards.Matches(r": ([\d ]+)$", column="answer")
Problem = tuple[str, str, str]  # question, steps, answer


def digits(numbers: list[int]) -> str:
    return " + ".join(" ".join(str(number)) for number in numbers)


def problems(size: int, terms: int, seed: int = 0) -> list[Problem]:
    """Write different sums of numbers from 1 to 9, with their steps."""
    rng, found = random.Random(seed), {}
    while len(found) < size:
        numbers = [rng.randrange(1, 10) for _ in range(terms)]
        left = [[sum(numbers[:i]), *numbers[i:]] for i in range(1, terms)]
        found[digits(numbers) + " ="] = (" = ".join(map(digits, left[1:])) + " :", digits([sum(numbers)]))
    return [(question, *rest) for question, rest in found.items()]


def untrained(width: int) -> LanguageModel:
    """Return a small Llama over digits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    network = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=64))
    return LanguageModel(network, word_tokenizer(WORDS, WORDS[0]))


def splits(*, quick: bool = False, extra: int = 0) -> list[list[Problem]]:
    """Return problems with written solutions, with answers, held-out ones, and further ones."""
    sizes = (20, 8, 4) if quick else (WRITTEN, KNOWN, HELD_OUT)
    found = problems(sum(sizes) + extra, 3 if quick else TERMS)
    return [found[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3)] + [found[sum(sizes) :]]


def fitted(written: list[Problem], folder: Path | None, *, quick: bool = False) -> LanguageModel:
    """Return the prior. It is kept in the folder, and a second call finds it there."""
    prior = untrained(16 if quick else WIDTH)
    table = {"prompt": [q for q, _, _ in written], "completion": [f"{steps} {answer}" for _, steps, answer in written]}
    settings = {"batch_size": 32, "learning_rate": 3e-3, "held_out": 0.05, "checkpoint": folder, "seed": 0}
    losses = prior.fit(table, num_steps=3 if quick else FIT_STEPS, **settings)
    print(f"the prior: {losses.held_out[losses.kept_step]:.3f} nats a token held out")
    return prior


def answer_of(text: str) -> str | None:
    """Return what stands after the colon."""
    return text.split(" : ")[1] if text.count(" : ") == 1 else None


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


def mean(values: np.ndarray) -> str:
    """Return a mean over problems with its standard error, in percent."""
    return f"{100 * values.mean():5.1f} ± {100 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


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
        errors = [x.std(ddof=1) / len(x) ** 0.5 for x in decisions]
        middle.errorbar(tokens, [x.mean() for x in decisions], errors, marker="o", capsize=2, label=name)
    middle.set(title="the answer that most draws have, held out", xlabel="tokens a problem", xscale="log")
    for axes in (left, middle):
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(folder: Path, quick: bool = False) -> None:
    warnings.filterwarnings("ignore", category=DiagnosticsWarning)  # a few draws, from which an answer is chosen
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    written, known, held_out, _ = splits(quick=quick)
    print("for example:", " ".join(held_out[0]))
    prior = fitted(written, None if quick else folder / "fit", quick=quick)
    print(f"{time.perf_counter() - started:.0f} s")

    questions, _, answers = (list(column) for column in zip(*known, strict=True))
    model = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST, subsample_size=4 if quick else 16)
    unseen = TiltedLM(prior, RIGHT, BETA, max_new_tokens=LONGEST)
    shown = [list(column) for column in zip(*held_out[:50], strict=True)]
    watch = HeldOut({"held_out": partial(unseen, shown[0], answer=shown[2])}, every=20, num_particles=4)
    kept = None if quick else folder / "svi"
    svi = SVI(2 if quick else STEPS, callbacks=[watch], checkpoint=kept, num_samples=1, num_prior_samples=0, seed=0)
    trained = svi.run(model, questions, answer=answers)
    print(f"SVI, {time.perf_counter() - started:.0f} s")
    learned = em(prior, known, 1 if quick else 4, 2 if quick else 50)
    print(f"EM, {time.perf_counter() - started:.0f} s")

    draws = [1, 2] if quick else [1, 4, 16]
    models = {"prior": (prior, 1.0), f"prior, power {ALPHA:g}": (prior, ALPHA)}
    models |= {"EM": (learned, 1.0), "SVI": (trained.policy, 1.0)}
    curves, rows = {}, [f"| | a draw | the answer of {draws[-1]} draws | tokens a problem |", "|---|---|---|---|"]
    for name, (lm, alpha) in models.items():
        accuracy, decisions, tokens = evaluate(lm, held_out, draws, alpha)
        curves[name] = tokens, decisions
        rows.append(f"| {name} | {mean(accuracy)} | {mean(decisions[-1])} | {tokens[-1]:.0f} |")
    print(f"{len(held_out)} held-out problems, percent right, mean ± standard error over them", *rows, sep="\n")
    (folder / "figures.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    draw_picture(folder / "reasoning.png", trained.stats, curves)
    trained.policy.save_pretrained(folder / "policy")
    print(f"all is in {folder}, after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/reasoning"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, for a few seconds")
    options = parser.parse_args()
    main(options.folder, options.quick)
