"""Powers of a language model, p(x)^alpha exp(r(x) / beta): network tokens to the same error, by SMC and by suffix MCMC.

    python benchmarks/powers.py [--chains 32] [--smollm2]

The suffix MCMC is that of Karan and Du (2025, arXiv 2510.14901): a suffix of the text is drawn anew from the model, and
accepted by Metropolis and Hastings (`MCMC` with one candidate; a fifth of its sweeps are warm-up). SMC has the twist of
the power in closed form, and one population of particles in each chain. Each chain is a run of its own; its error is
that of its mean of log p(x), in standard deviations of log p under the target. Tokens are all those that the network
has read, of first texts and final scores too.

The models are enumerated: a table of two words of context, and a random Llama. A cell has the tokens of a chain and the
root mean square of the chains' errors; the last columns the tokens for the error of one independent draw, that is
tokens * error^2, at the larger budget, and their ratio. ``--smollm2`` is SmolLM2-135M with texts of at most 8 tokens;
the truth is then the mean of six chains of SMC of 128 particles, which is printed too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayeslm.inference import MCMC, SMC, Exact
from bayeslm.inference.sequential import Power
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.posterior import Posterior

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.models import table_lm, tiny_llama

BUDGETS = {"SMC": (16, 64), "MCMC": (100, 400)}  # particles of a chain; draws of a chain


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What chains say, each for itself.

    :param means: of log p (chain,).
    :param tokens: of the network, of a chain.
    """

    means: np.ndarray
    tokens: float

    def error(self, truth: float) -> float:
        return float(np.sqrt(((self.means - truth) ** 2).mean()))


def count(completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def log_p(model: TiltedLM, posterior: Posterior, prompt: Any) -> np.ndarray:
    """Return log p of the draws of a prompt, (chain, draw)."""
    x = torch.as_tensor(posterior.samples["completion"][:, :, 0])
    distribution = model.prior([prompt], **model.prior_settings)
    with torch.no_grad():
        return distribution.log_prob(x.reshape(-1, 1, x.shape[-1])).double().reshape(x.shape[:2]).numpy()


def estimates(engine: Any, model: TiltedLM, prompt: Any) -> Estimates:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = engine.run(model, [prompt])
    log_w = posterior.log_weights[..., 0]
    weights = np.exp(log_w - log_w.max(1, keepdims=True))
    means = (weights * log_p(model, posterior, prompt)).sum(1) / weights.sum(1)
    return Estimates(means, posterior.stats["tokens"] / len(means))


def engine(name: str, size: int, chains: int, alpha: float, seed: int = 0) -> Any:
    if name == "SMC":
        return SMC(size, chains, twist=Power(alpha), seed=seed, progress=False)
    start = {"initial_particles": chains, "num_candidates": 1, "warmup": size // 4}
    return MCMC(size, chains, **start, seed=seed, progress=False)


def enumerated(lm: LanguageModel, alpha: float, rewarded: bool, tokens: int, chains: int) -> str:
    model = TiltedLM(lm, count if rewarded else None, beta=1.0, max_new_tokens=tokens, power=alpha)
    prompt = [1, 2]
    exact = Exact().run(model, [prompt])
    values, weights = log_p(model, exact, prompt)[0], exact.weights()[0, :, 0]
    finite = weights > 0
    truth = float(weights[finite] @ values[finite])
    spread = float(np.sqrt(weights[finite] @ (values[finite] - truth) ** 2))
    cells, worth = [], {}
    for name, sizes in BUDGETS.items():
        for size in sizes:
            found = estimates(engine(name, size, chains, alpha), model, prompt)
            error = found.error(truth) / spread
            cells.append(f"{found.tokens:.0f}: {error:.3f}")
            worth[name] = found.tokens * error**2
            print(name, size, cells[-1], file=sys.stderr)
    ratio = worth["MCMC"] / worth["SMC"]
    return f"| {' | '.join(cells)} | {worth['SMC']:.0f} | {worth['MCMC']:.0f} | {ratio:.1f} |"


def smollm2(alpha: float, chains: int) -> None:
    lm = LanguageModel.from_pretrained("smollm2", dtype=torch.float32).packed()
    model, prompt = TiltedLM(lm, None, max_new_tokens=8, power=alpha), "My dinner at the restaurant was"
    found = {"SMC": estimates(engine("SMC", 16, chains, alpha), model, prompt)}
    found["MCMC"] = estimates(engine("MCMC", 40, chains, alpha), model, prompt)
    means = np.array([each.means.mean() for each in found.values()])
    errors = np.array([each.means.std(ddof=1) / chains**0.5 for each in found.values()])
    reference = estimates(engine("SMC", 128, 6, alpha, seed=1), model, prompt)
    truth = float(reference.means.mean())
    print(f"SmolLM2-135M, alpha = {alpha:g}, {chains} chains\n")
    print(f"mean of log p by SMC of 128 particles: {truth:.2f} ± {reference.means.std(ddof=1) / 6**0.5:.2f}\n")
    print("| | tokens of a chain | mean of log p | error of a chain |")
    print("|---|---|---|---|")
    for (name, each), mean, error in zip(found.items(), means, errors, strict=True):
        print(f"| {name} | {each.tokens:.0f} | {mean:.2f} ± {error:.2f} | {each.error(truth):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=32, help="independent runs of each engine")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M in the place of enumerated models")
    options = parser.parse_args()
    if options.smollm2:
        smollm2(4.0, options.chains)
        return
    models = {"table": (table_lm(order=3, seed=1, vocab=4), 8), "Llama": (tiny_llama(seed=1), 5)}
    heads = [f"{name} {size}" for name, sizes in BUDGETS.items() for size in sizes]
    print(f"| model | alpha | reward | {' | '.join(heads)} | SMC, tokens a draw | MCMC | ratio |")
    print("|---" * (len(heads) + 6) + "|")
    for name, (lm, tokens) in models.items():
        for alpha in (0.5, 2.0, 4.0):
            for rewarded in (False, True):
                row = enumerated(lm, alpha, rewarded, tokens, options.chains)
                print(f"| {name} | {alpha:g} | {'a count' if rewarded else '–'} {row}", flush=True)


if __name__ == "__main__":
    main()
