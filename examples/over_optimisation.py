"""Over-optimisation: how much reward is too much, if the reward was learned and is uncertain.

    python examples/over_optimisation.py [folder]        (default: runs/over_optimisation; two minutes)

The prior is a small language model. A judge with a hidden reward compares some of its texts, a Bradley-Terry reward is
inferred from the comparisons, and the prior is optimised for it more and more strongly: tilted with a smaller beta, or
by the best of more draws. All distributions are enumerated, so that the only sampling error of the curves is that of
the data sets.

Each word has a value, and the learned reward counts words. So does the judge of the upper row, and the learned reward
is right up to its uncertainty. The judge of the lower row dislikes repeated words, which are rare in draws from the
prior and common in optimised texts: there the learned reward is wrong away from its data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax, xlogy

from bayeslm.inference import NUTS
from bayeslm.models import LanguageModel
from bayeslm.models.preferences import BradleyTerry, Comparisons, Form, UncertainReward
from bayeslm.plots import plot_over_optimisation

Array = NDArray[np.float64]
Curves = dict[str, dict[str, Array]]

PROMPT = "a"
SPREAD = 3.0  # standard deviation of word values times sqrt(words), in log-odds: the scale of the learner's prior too
BETAS = np.geomspace(8.0, 1 / 128, 21)
NS = 2 ** np.arange(0, 21, 2)
FORMS: tuple[Form, ...] = ("mean", "draw", "quantile", "marginal")
JOINT = "latent with exp(r / β)"


def count(prompts: list[str], completions: list[str]) -> torch.Tensor:
    """Return the number of occurrences of each word a ... g in each completion, (n, 7)."""
    return torch.tensor([[text.count(word) for word in "abcdefg"] for text in completions]).float()


class Task:
    """A prior over texts of the words a ... g, a table of random bigrams, and a judge.

    :param seed: seed of the prior, the judge and the comparisons.
    :param fatigue: the judge subtracts fatigue (k - 1)² for a word that occurs k times.
    :param num_comparisons: number of comparisons by the judge.
    :param length: number of words in the longest text.
    :param draws: number of draws of the posterior of the judge's reward.
    """

    def __init__(self, seed: int, fatigue: float, num_comparisons: int = 30, length: int = 5, draws: int = 128) -> None:
        self.seed, self.length, self.num_comparisons, self.draws = seed, length, num_comparisons, draws
        self.rng = np.random.default_rng(seed)
        self.prior = LanguageModel.tabular(["<eos>", *"abcdefg"], seed=seed)
        completion = self.prior([PROMPT], max_new_tokens=length)
        support = completion.enumerate_support()  # (text, 1, token)
        self.log_p: Array = completion.log_prob(support)[:, 0].double().numpy()
        self.texts: list[str] = completion.decode(support)[:, 0].tolist()
        counts = count([], self.texts).double().numpy()
        values = SPREAD / np.sqrt(7) * self.rng.normal(size=7)
        reward = counts @ values - fatigue * (np.maximum(counts - 1, 0) ** 2).sum(1)
        self.true: Array = reward - np.exp(self.log_p) @ reward  # minus the prior's mean

    def comparisons(self) -> Comparisons:
        """Draw pairs of texts from the prior, and let the judge prefer one of each by the Bradley-Terry model."""
        p = np.exp(self.log_p) * [bool(text) for text in self.texts]
        pairs = (self.rng.choice(len(p), 2, replace=False, p=p / p.sum()) for _ in range(self.num_comparisons))
        better = [(i, j) if self.rng.random() < expit(self.true[i] - self.true[j]) else (j, i) for i, j in pairs]
        chosen, rejected = ([self.texts[i] for i in column] for column in zip(*better, strict=True))
        return Comparisons([PROMPT] * len(better), chosen, rejected)

    def learn(self) -> UncertainReward:
        """Infer the judge's reward."""
        engine = NUTS(num_samples=self.draws, warmup=80, num_chains=1, seed=self.seed, progress=False)
        posterior = engine.run(self.learner(), self.comparisons())
        return self.centred(UncertainReward.from_posterior(self.learner(), posterior, "mean", seed=self.seed))

    def learner(self) -> BradleyTerry:
        """Return the learner's model of the judge, which has no fatigue."""
        return BradleyTerry(count, scale=SPREAD)

    def centred(self, reward: UncertainReward) -> UncertainReward:
        """Return the reward with the mean features of the prior's texts as the typical ones."""
        return reward.centred(self.prior, [PROMPT], max_new_tokens=self.length, num_samples=4096)

    def scores(self, reward: UncertainReward) -> dict[str, Array]:
        """Return the rewards of all texts, (text,), by form."""
        return {form: reward.to_form(form)([PROMPT], self.texts).double().numpy() for form in FORMS}

    def tilted(self, scores: dict[str, Array], margins: torch.Tensor) -> dict[str, Array]:
        """Return the distributions p(x) exp(r(x) / beta) / Z, (beta, text), by form."""
        tilted = {name: softmax(self.log_p + score / BETAS[:, None], axis=1) for name, score in scores.items()}
        joint = np.stack([(margins / beta).logsumexp(1).double().numpy() for beta in BETAS])
        return tilted | {JOINT: softmax(self.log_p + joint, axis=1)}

    def best_of(self, scores: dict[str, Array]) -> dict[str, Array]:
        """Return the distributions of the best of n draws, (n, text), by form: P(best <= s) = P(r <= s)^n.

        Draws with equal rewards are equally likely to be the best.
        """
        p = softmax(self.log_p)
        best = {}
        for name, score in scores.items():
            values, tie = np.unique(score, return_inverse=True)
            mass = np.bincount(tie, p, len(values))
            at_most = np.append(0.0, np.cumsum(mass).clip(0, 1))[:, None] ** NS  # (value + 1, n)
            best[name] = (p / mass[tie]) * np.diff(at_most, axis=0).T[:, tie]
        return best

    def curve(self, q: Array, proxy: Array) -> dict[str, Array]:
        """Return KL to the prior, mean true reward and mean learned reward of q (strength, text), each (strength,)."""
        kl = (xlogy(q, q) - q * self.log_p).sum(1)
        return {"kl": kl, "true": q @ self.true, "proxy": q @ proxy}


def curves(fatigue: float, seeds: range, **settings: int) -> tuple[Curves, Curves]:
    """Return the curves of the tilted prior and of best-of-n, (seed, strength) by form."""
    both: tuple[list[dict[str, dict[str, Array]]], ...] = ([], [])
    for seed in seeds:
        task = Task(seed, fatigue, **settings)
        reward = task.learn()
        scores = task.scores(reward)
        distributions = task.tilted(scores, reward.margins([PROMPT], task.texts)), task.best_of(scores)
        for found, by_form in zip(both, distributions, strict=True):
            found.append({name: task.curve(q, scores["mean"]) for name, q in by_form.items()})

    def stacked(found: list[dict[str, dict[str, Array]]]) -> Curves:
        return {name: {key: np.stack([one[name][key] for one in found]) for key in found[0][name]} for name in found[0]}

    return stacked(both[0]), stacked(both[1])


def main(folder: Path, seeds: range = range(16)) -> None:
    panels: dict[str, Curves] = {}
    for judge, fatigue in {"learned reward right": 0.0, "learned reward wrong away from its data": 0.5}.items():
        tilted, best = curves(fatigue, seeds)
        panels |= {f"posterior, β from 8 to 1/128: {judge}": tilted, f"best of n, 1 to 2^20: {judge}": best}
    for title, panel in panels.items():
        print(f"\n{title}\n  true reward{'at KL 4':>23}{'strongest':>12}{'minus mean form':>22}{'KL':>8}")
        for name, curve in panel.items():
            kl, true = curve["kl"].mean(0), curve["true"].mean(0)
            difference = curve["true"][:, -1] - panel["mean"]["true"][:, -1]
            error = difference.std(ddof=1) / np.sqrt(len(difference))
            compared = "" if name == "mean" else f"{difference.mean():.2f} ± {error:.2f}"
            print(f"  {name:26}{np.interp(4.0, kl, true):8.2f}{true[-1]:12.2f}{compared:>22}{kl[-1]:8.1f}")
    folder.mkdir(parents=True, exist_ok=True)
    plot_over_optimisation(panels).savefig(folder / "over_optimisation.png", dpi=150)
    print(f"\ncurves: {folder / 'over_optimisation.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/over_optimisation"))
