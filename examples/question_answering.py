"""Question answering: what a small model knows, when it should say "I don't know", and how sure it is.

    python examples/question_answering.py [--price 0.4]      (some four minutes on two cores)

Questions about countries come from the package countryinfo, with references a row: every name that is right. SmolLM2
answers after two examples. Its probability of an answer is the share of its draws that give it, its answer the one of
highest probability (`Posterior.decide`), and it abstains where its probability is below the price of an abstention,
which is then the better utility. The likelihood exp(r / beta), r = 1 for a right answer, the price for an abstention
and 0 else, tilts it; `SVI` trains a policy on some countries, and other countries say what it has gained: exact match,
F1, calibration, coverage. It writes the figures, the policy and the picture into the folder.
"""

from __future__ import annotations

import random
import time
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _figures import count, mean, parser, share, table, with_error, write

from bayeslm import DiagnosticsWarning
from bayeslm.calibration import calibrate
from bayeslm.decisions import SameAnswer
from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.plots import COLOURS, PRIOR_COLOUR

ABSTENTION = "I don't know"
EXAMPLES = "Q: What is the capital of Japan?\nA: Tokyo\nQ: How old is the mayor of Ulm?\nA: I don't know\nQ: {}\nA:"
WRITING: dict[str, Any] = {"max_new_tokens": 6, "stop": "\n"}
BETA = 0.15
exact_match, f1 = rewards.ExactMatch(), rewards.TokenF1()
abstains = rewards.Matches(r"(?i)^\s*(I don.?t know|I.?m (not sure|unsure)|no idea|unknown)\b")
Row = dict[str, Any]


def questions() -> list[list[Row]]:
    """Return the questions of each country of more than a million people: rows with a prompt and its references."""
    import countryinfo  # the extra "examples"

    every = (country.info() for country in countryinfo.all_countries())
    known = [one for one in every if one.get("population", 0) > 1e6 and one.get("capital") and one.get("demonym")]
    return [asked(one) for one in known if one["capital"] not in EXAMPLES]


def asked(country: Row) -> list[Row]:
    name, capital, people = country["name"], country["capital"], country["demonym"]
    continents = {"Americas": ["America", "Americas", "South America", "North America"]}
    right = {
        f"What is the capital of {name}?": [capital],
        f"{capital} is the capital of which country?": [name, *country["altSpellings"]],
        f"What are people from {name} called?": [people, people + "s"],
        f"On which continent is {name}?": continents.get(country["region"], [country["region"]]),
    }
    return [{"prompt": EXAMPLES.format(q), "references": with_ascii(names)} for q, names in right.items()]


def with_ascii(names: list[str]) -> list[str]:
    """Return names, and each without its accents."""
    plain = [unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() for name in names]
    return [name for name in dict.fromkeys([*names, *plain]) if rewards.normalised_answer(name)]


def answer(text: str) -> str | None:
    """Return the answer of a completion, None where it abstains or says nothing."""
    return None if abstains([""], [text]).item() else rewards.normalised_answer(text) or None


class Priced(SameAnswer):
    """1 for the answer of the draw, and a price for abstaining, whatever is right."""

    def __init__(self, price: float) -> None:
        super().__init__(answer)
        self.price = price

    def table(self, candidates: list[str], draws: list[str]) -> np.ndarray:
        utilities = super().table(candidates, draws)
        utilities[[answer(text) is None for text in candidates]] = self.price
        return utilities


@dataclass
class HeldOut:
    """Draws of a model for held-out questions, and what is decided by them."""

    lm: LanguageModel
    rows: list[Row]
    draws: int

    def __post_init__(self) -> None:
        model = TiltedLM(self.lm.packed(), None, **WRITING)
        self.posterior = ImportanceSampling(self.draws, seed=1).run(model, [row["prompt"] for row in self.rows])
        self.said = self.posterior.texts["completion"][0]  # (draw, question)
        best = self.posterior.decide(SameAnswer(answer), also=[ABSTENTION])
        self.confidence, self.right = best.expected_utility, self.judged(exact_match, best.texts)
        self.f1 = self.judged(f1, best.texts)
        self.calibration = calibrate(self.confidence[None, None], self.right, bins=5, folded=False)

    def judged(self, reward: rewards.Reward, texts: Any) -> np.ndarray:
        """Return the rewards of texts (*, question)."""
        prompts, references = ([row[name] for row in self.rows] for name in ("prompt", "references"))
        return reward(prompts, texts, references=references).numpy()

    def answered(self, price: float) -> np.ndarray:
        """Return which questions are answered at a price, bool (question,)."""
        texts = self.posterior.decide(Priced(price), also=[ABSTENTION]).texts
        return np.array([answer(text) is not None for text in texts])

    def score(self, price: float) -> np.ndarray:
        """Return 1 for a right answer, the price for an abstention, else 0, (question,)."""
        return np.where(self.answered(price), self.right, price)

    def figures(self, price: float) -> dict[str, str]:
        percent = {
            "a draw: exact match": self.judged(exact_match, self.said).mean(0),
            "a draw: F1": self.judged(f1, self.said).mean(0),
            "a draw: abstains": self.judged(abstains, self.said).mean(0),
            "likeliest answer: exact match": self.right,
            "likeliest answer: F1": self.f1,
            "likeliest answer: its probability": self.confidence,
            f"price {price}: answered": self.answered(price),
            f"price {price}: right of those answered": self.right[self.answered(price)],
            f"price {price}: score": self.score(price),
        }
        ece, chance = self.calibration.ece, self.calibration.ece_if_calibrated[0]
        error = f"{with_error(100 * ece.value, 100 * ece.stderr, 1)} ({100 * chance:.1f})"
        cells = {name: mean(100 * np.asarray(values, dtype=float), 1) for name, values in percent.items()}
        return cells | {"calibration error, ECE (if probabilities were right)": error}


def picture(found: dict[str, HeldOut], price: float, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    left.plot((0, 1), (0, 1), color=PRIOR_COLOUR, linewidth=0.8)
    for (name, held), colour in zip(found.items(), (PRIOR_COLOUR, COLOURS[0]), strict=True):
        style: dict[str, Any] = {"fmt": "o-", "color": colour, "label": name, "capsize": 2, "markersize": 4}
        bins = held.calibration
        some = bins.counts > 0
        left.errorbar(bins.confidence[some], bins.right[some], bins.right_stderr[some], **style)
        kept = {p: held.answered(p) for p in sorted({price, *np.linspace(0, 0.9, 10).round(1)})}
        kept = {p: each for p, each in kept.items() if each.any()}
        shares = {p: (each.mean(), held.right[each].mean()) for p, each in kept.items()}
        errors = [
            (y * (1 - y) / each.sum()) ** 0.5 for each, (_, y) in zip(kept.values(), shares.values(), strict=True)
        ]
        right.errorbar(*zip(*shares.values(), strict=True), errors, **style)
        right.plot(*shares.get(price, (np.nan, np.nan)), "*", color=colour, markersize=15)
    share_right = "share right"
    left.set(xlabel="probability of the likeliest answer", ylabel=share_right, ylim=(-0.05, 1.05))
    left.set_title("calibration, ± one standard error")
    right.set(xlabel="share of questions answered", ylabel=f"{share_right} of those answered", ylim=(0, 1.02))
    right.set_title(f"prices of an abstention from 0 to 0.9; star: {price}")
    right.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None, prior: LanguageModel | None = None) -> dict[str, HeldOut]:
    options = parser(__doc__, "question_answering")
    options.add_argument("--price", type=share, default=0.4, help="of an abstention, between 0 and 1")
    options.add_argument("--steps", type=count, default=12, help="of the training")
    chosen = options.parse_args(arguments)
    steps, held_out, draws = (2, 6, 4) if chosen.quick else (chosen.steps, 48, 12)
    warnings.simplefilter("ignore", DiagnosticsWarning)  # of the few draws of each question of the training
    started = time.perf_counter()
    countries = questions()
    random.Random(0).shuffle(countries)
    half = len(countries) // 2
    seen, unseen = ([row for rows in some for row in rows] for some in (countries[:half], countries[half:]))
    prior = prior or LanguageModel.from_pretrained("smollm2")
    model = TiltedLM(prior, exact_match + chosen.price * abstains, BETA, subsample_size=6, **WRITING)
    svi = SVI(steps, num_particles=6, num_samples=4, num_prior_samples=0, seed=0)
    policy = svi.run(model, random.Random(0).sample(seen, 8 if chosen.quick else 36)).policy
    rows = random.Random(1).sample(unseen, held_out)
    found = {name: HeldOut(lm, rows, draws) for name, lm in {"prior": prior, "policy": policy}.items()}
    cells = [held.figures(chosen.price) for held in found.values()]
    gain = found["policy"].score(chosen.price) - found["prior"].score(chosen.price)
    lines = [f"{held_out} held-out questions, {draws} draws of each; mean ± standard error over questions", ""]
    lines += table({name: [cell[name] for cell in cells] for name in cells[0]}, ["percent", *found])
    lines += ["", f"score of the policy less the prior's, of the same questions: {mean(100 * gain, 1)}"]
    write(chosen.folder, lines, started)
    picture(found, chosen.price, chosen.folder / "question-answering.png")
    policy.save_pretrained(chosen.folder / "policy")
    return found


if __name__ == "__main__":
    main()
