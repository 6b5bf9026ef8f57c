"""One draw that dominates an estimate: from which share of its variance on a warning tells more than it cries wolf.

    python benchmarks/dominance.py

Problems are enumerated: 4,096 texts with a skewed prior, a continuous reward of each, and a β. A run has N draws of the
prior; its figures are log Z, E[r] and KL(π* ‖ p), and each covers if the truth is within two of its standard errors. A
row has the worst coverage of the three over 200 runs, the share of runs that the other rules warn of (k̂ > 0.7, ESS <
20), and the share that is warned of with each limit of the largest draw's share. The rule was chosen on the first
rewards as the smallest limit that warns of at most one run in ten where the intervals cover (0.93 of them or more), and
is judged on the others. The last line is the coverage, worst of the three figures, of all runs without a warning.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from bayeslm import Posterior, diagnostics
from bayeslm.reliability import ESS_LIMIT, KHAT_LIMIT, dominance
from bayeslm.weights import log_evidence

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
TEXTS, REPLICATES = 4096, 200
LIMITS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
COVERS, FAILS = 0.93, 0.90
REWARDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda rng: rng.normal(size=TEXTS),
    "exponential": lambda rng: rng.exponential(size=TEXTS),
    "sentiment": lambda rng: rng.beta(0.4, 0.6, TEXTS),  # most texts near 0 or near 1
    "rarely good": lambda rng: rng.beta(0.5, 4.0, TEXTS),
    "uniform": lambda rng: rng.random(TEXTS),
    "logistic": lambda rng: rng.logistic(size=TEXTS),
    "two modes": lambda rng: rng.normal(size=TEXTS) + 3.0 * (rng.random(TEXTS) < 0.05),
    "gumbel": lambda rng: rng.gumbel(size=TEXTS),
}
CHOSEN = {
    "normal": (2.0, 1.5, 1.2, 1.0, 0.8, 0.6),
    "exponential": (6.0, 4.0, 3.0, 2.5, 2.0),
    "sentiment": (0.4, 0.2, 0.1, 0.06),
    "rarely good": (0.5, 0.35, 0.25, 0.2, 0.15),
}
JUDGED = {
    "uniform": (0.4, 0.2, 0.1, 0.06),
    "logistic": (8.0, 5.0, 4.0, 3.0),
    "two modes": (4.0, 3.0, 2.0, 1.5),
    "gumbel": (6.0, 4.0, 3.0, 2.5),
}


def measure(name: str, beta: float, draws: int, seed: int) -> tuple[Mask, Mask]:
    """Return whether each figure covers, (figure, run), and whether a run is warned of.

    The latter is (1 + limit, run): by the other rules alone, and with each limit.
    """
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(TEXTS, 0.2))
    reward = REWARDS[name](rng)
    log_z = logsumexp(reward / beta, b=prior)
    mean = (prior * np.exp(reward / beta - log_z) * reward).sum()
    r = reward[rng.choice(TEXTS, (1, draws, REPLICATES), p=prior)]
    known = log_evidence(r / beta)
    posterior = Posterior(
        samples={},
        log_weights=r / beta,
        log_joint=r / beta,
        log_likelihood={"reward": r / beta},
        rewards={"reward": r},
        log_evidence=known[0],
        log_evidence_stderr=known[1],
        kind="weighted",
        engine="",
        dims={},
        prompts=[str(i) for i in range(REPLICATES)],
    )
    figures = [known, diagnostics.expectation(posterior, r), diagnostics.kl_to_prior(posterior)]
    truths = [log_z, mean, mean / beta - log_z]
    inside = np.array([np.abs(x - truth) < 2 * error for (x, error), truth in zip(figures, truths, strict=True)])
    others = (diagnostics.psis(r / beta)[1] > KHAT_LIMIT) | (diagnostics.ess(r / beta) < ESS_LIMIT)
    share = np.array(list(dominance(posterior).values())).max(0)
    return inside, others | (share > np.array([np.inf, *LIMITS])[:, None])


def table(title: str, problems: dict[str, tuple[float, ...]], draws: list[int]) -> None:
    """Print a row for each problem, and the means where intervals cover and where they do not."""
    print(f"\n## {title}\n")
    print("| reward | β | N | coverage | other rules | " + " | ".join(f"> {x:.0%}" for x in LIMITS) + " |")
    print("|---" * (5 + len(LIMITS)) + "|")
    found = []

    def row(label: str, cells: Iterable[float]) -> None:
        print(f"| {label} | " + " | ".join(f"{x:.0%}" for x in cells) + " |", flush=True)

    for n in draws:
        for name, betas in problems.items():
            for seed, beta in enumerate(betas):
                inside, warned = measure(name, beta, n, 7 + seed)
                found.append((inside, warned))
                row(f"{name} | {beta} | {n} | {inside.mean(1).min():.2f}", warned.mean(1))
    covers = [warned.mean(1) for inside, warned in found if inside.mean(1).min() >= COVERS]
    fails = [warned.mean(1) for inside, warned in found if inside.mean(1).min() < FAILS]
    row(f"{len(covers)} that cover | | | ", np.mean(covers, axis=0))
    row(f"{len(fails)} that fail | | | ", np.mean(fails, axis=0))
    inside, warned = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    row("coverage of runs without a warning | | | ", [inside[:, ~some].mean(1).min() for some in warned])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[256, 1024])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table("chosen on", CHOSEN, options.draws)
    table("judged on", JUDGED, options.draws)


if __name__ == "__main__":
    main()
