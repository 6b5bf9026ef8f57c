"""Generation: tone and topic of SmolLM2's texts by five engines, reward against KL on one picture, and diversity.

    python examples/generation.py [--beta 0.2] [--folder runs/generation]

The reward asks for a friendly text about the sea that insults nobody. A posterior of any beta is a point of the plane
of KL to the prior and mean reward, and the exact posteriors are its upper edge: nothing has more reward at a KL.
Importance sampling gives the whole edge from one set of draws (`at_beta`), best-of-n a point for each n, `SMC` and
`MCMC` one for each beta, and `SVI` a path, the policy in training, evaluated on prompts that it is not trained on. All
figures are of these held-out prompts. Diversity is the share of distinct pairs of tokens among equally many draws.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from _figures import count, mean, parser, positive, table, with_error, write

from bayeslm import DiagnosticsWarning, Posterior, diagnostics
from bayeslm.inference import MCMC, SMC, SVI, BestOfN, ImportanceSampling
from bayeslm.inference.training import HeldOut
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.plots import COLOURS, PRIOR_COLOUR
from bayeslm.reweighting import at_beta

TOPIC = "A day at the beach by the sea, with waves, swimming and sailing boats."
SEEN = ["Last week my sister", "The teacher said that", "After lunch they", "On Sunday the old man"]
PROMPTS = ["Yesterday morning we", "My neighbour told me that", "In the evening the children"]  # held out
TOKENS = 12
DIVERSITY_DRAWS = 8  # of each prompt
BETAS = np.geomspace(2.0, 0.05, 12)
ESS = 10  # effective draws: of fewer, importance sampling has no point


class Point(NamedTuple):
    """Mean over prompts of KL to the prior and of the reward, each with its standard error."""

    kl: tuple[float, float]
    reward: tuple[float, float]


def over_prompts(estimate: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Return the mean over prompts, of figures with standard errors (prompt,), and its standard error."""
    return float(estimate[0].mean()), float(np.sqrt(np.square(estimate[1]).sum()) / len(estimate[1]))


def point(posterior: Posterior, *, weighted: bool = True) -> Point:
    if posterior.engine == "BestOfN":
        kl = (float(posterior.stats["kl_bound"]), 0.0)
    else:
        kl = over_prompts(diagnostics.kl_to_prior(posterior, weighted=weighted))
    return Point(kl, over_prompts(diagnostics.expectation(posterior, posterior.measured, weighted=weighted)))


def figures(posterior: Posterior, parts: dict[str, rewards.Reward], *, weighted: bool = True) -> list[str]:
    """Return a row: KL, reward, its parts, and diversity."""
    texts, found = posterior.texts["completion"], point(posterior, weighted=weighted)
    cells = [with_error(*found.kl), with_error(*found.reward)]
    for part in parts.values():
        scores = part(PROMPTS, texts).numpy()
        cells.append(with_error(*over_prompts(diagnostics.expectation(posterior, scores, weighted=weighted))))
    if posterior.kind in ("weighted", "particles") and weighted:
        posterior = posterior.resample(DIVERSITY_DRAWS // len(posterior.log_weights))
    ids, lengths = posterior.samples["completion"], posterior.lengths["completion"]
    every = np.arange(ids.shape[0] * ids.shape[1])
    some = every[:: max(1, len(every) // DIVERSITY_DRAWS)][:DIVERSITY_DRAWS]  # from all chains
    ids, lengths = (x.reshape(1, -1, *x.shape[2:])[:, some] for x in (ids, lengths))
    return [*cells, mean(diagnostics.distinct_n(ids, lengths, 2))]


def picture(paths: dict[str, list[Point]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for (name, points), colour, marker in zip(paths.items(), (PRIOR_COLOUR, *COLOURS), "os^Dv", strict=False):
        (x, dx), (y, dy) = (np.array([getattr(p, part) for p in points]).T for part in ("kl", "reward"))
        line = "-" if len(points) > 3 else ""
        axis.errorbar(x, y, dy, dx, fmt=f"{marker}{line}", color=colour, markersize=5, capsize=2, label=name, alpha=0.9)
    axis.set(xlabel="KL to the prior, nats a text", ylabel="reward, ± one standard error")
    axis.set_title("held-out prompts; exact posteriors are the upper edge", fontsize=10)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None, lm: LanguageModel | None = None) -> dict[str, list[Point]]:
    options = parser(__doc__, "generation")
    options.add_argument("--beta", type=positive, default=0.2, help="the KL coefficient of the table")
    options.add_argument("--steps", type=count, default=9, help="of the training")
    chosen = options.parse_args(arguments)
    beta, quick = chosen.beta, chosen.quick
    warnings.simplefilter("ignore", DiagnosticsWarning)  # runs are short; ESS decides what is shown
    started = time.perf_counter()
    lm = lm or LanguageModel.from_pretrained("smollm2")
    packed = lm.packed()
    parts = {"tone": rewards.Sentiment(), "topic": rewards.Similarity(TOPIC), "offence": rewards.Toxicity()}
    reward = parts["tone"] + 2 * parts["topic"] - parts["offence"]

    def target(at: float) -> TiltedLM:
        return TiltedLM(packed, reward, at, max_new_tokens=TOKENS)

    pool = ImportanceSampling(4 if quick else 24, 4, seed=0).run(target(1e6), PROMPTS)
    frontier = {float(at): at_beta(pool, at) for at in sorted({beta, *BETAS.tolist()}, reverse=True)}
    best = {n: BestOfN(n, 8, seed=1).run(target(1.0), PROMPTS) for n in ((2,) if quick else (4, 16))}
    smc = {at: SMC(4 if quick else 16, 2, twist="partial", seed=2).run(target(at), PROMPTS) for at in (2 * beta, beta)}
    chains = {}
    for at in (2 * beta, beta):
        mcmc = MCMC(4 if quick else 6, 4, 1 if quick else 2, initial_particles=8 if quick else 24, seed=3)
        own, known = mcmc.run(target(at), PROMPTS), at_beta(pool, at)  # of which MCMC has no log Z
        chains[at] = replace(own, log_evidence=known.log_evidence, log_evidence_stderr=known.log_evidence_stderr)
    model = TiltedLM(lm, reward, beta, max_new_tokens=TOKENS)
    steps = 2 if quick else chosen.steps
    svi = SVI(
        steps,
        num_particles=2 if quick else 4,
        callbacks=[HeldOut({"held_out": partial(model, PROMPTS)}, every=max(1, steps // 3), num_particles=12)],
        num_samples=4,
        num_prior_samples=0,
        seed=4,
    )
    trained = svi.run(model, SEEN)
    drawn = ImportanceSampling(8 if quick else 16, guide=trained.policy, seed=5).run(model, PROMPTS)
    stats = {name: trained.stats[f"held_out_{name}"][0] for name in ("kl", "reward", "reward_stderr")}
    path = [over_prompts(each) for each in zip(stats["reward"], stats["reward_stderr"], strict=True)]
    paths = {
        "importance sampling": [point(p) for p in frontier.values() if diagnostics.ess(p.log_weights).min() >= ESS],
        "best of n": [point(p) for p in best.values()],
        "SMC": [point(p) for p in smc.values()],
        "MCMC": [point(p) for p in chains.values()],
        "SVI, a policy in training": [Point((float(k.mean()), 0.0), r) for k, r in zip(stats["kl"], path, strict=True)],
    }
    rows = {
        "prior": figures(pool, parts),
        f"importance sampling, beta {beta}": figures(frontier[beta], parts),
        f"best of {max(best)}": figures(best[max(best)], parts),
        f"SMC, beta {beta}": figures(smc[beta], parts),
        f"MCMC, beta {beta}": figures(chains[beta], parts),
        f"SVI, beta {beta}: the policy": figures(drawn, parts, weighted=False),
    }
    head = ["", "KL to the prior", "reward", *parts, "distinct pairs"]
    least = diagnostics.ess(frontier[beta].log_weights).min()
    note = f"importance sampling at beta {beta}: ESS {least:.0f} of {pool.log_weights[..., 0].size}"
    write(chosen.folder, [*table(rows, head), "", note], started)
    picture(paths, chosen.folder / "generation.png")
    return paths


if __name__ == "__main__":
    main()
