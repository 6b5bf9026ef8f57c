"""Summaries: SmolLM2 writes one sentence on an article, aligned to its meaning, to brevity and to words of its own.

    python examples/summaries.py [--folder runs/summaries]        (five minutes of two cores)

The articles are descriptions in NumPy's, SciPy's and NetworkX's own documentation, as installed here: a few sentences
each, under a line that a person wrote, which is the reference. The reward of a summary is

    similarity of meaning with the article  -  0.01 for each word  -  0.05 for each word of a copied run beyond three

(cosine of sentence embeddings; the run is the longest one of words that the article has in this order too). Then

    prior         draws of SmolLM2-135M-Instruct
    posterior     the same draws, weighted by exp(r / beta)
    best of n     the same draws, the one of highest reward
    policy        draws of the policy that `SVI()` trains on other articles
    SMC           draws of the prior under a hard constraint: at most 12 words

Figures are of held-out articles, means with standard errors over them; none is trained on. The similarity with the
reference is in no reward. The training is kept in the folder, and the next call goes on from there.
"""

from __future__ import annotations

import importlib
import inspect
import re
import time
import warnings
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from _figures import count, mean, parser, stderr, table, write

from bayeslm import Posterior
from bayeslm.inference import SMC, SVI, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.posterior import DiagnosticsWarning

SOURCES = ["networkx", "numpy", "scipy.stats", "scipy.signal", "scipy.optimize", "scipy.ndimage", "scipy.linalg"]
TRAIN, HELD_OUT, DRAWS, STEPS, PARTICLES = 14, 10, 6, 7, 8
BETA, LONGEST, MOST_WORDS = 0.05, 20, 12
PER_WORD, PER_COPIED, FREE_RUN = 0.01, 0.05, 3


class Article(dict[str, str]):
    """An article: its text, and the line that a person wrote above it."""


def articles(modules: list[str] = SOURCES) -> list[Article]:
    """Return descriptions of 30 to 60 words of prose in the documentation of modules, in a fixed order."""
    stop = r"\n[-=]{3,}|\n\s+\S|^[:.>*-]|::|:math:|[\\$=<>\[\]]"  # a heading, list, formula or example; what many share
    stop += '|As an instance of the|"batch"'
    found = {}
    for module in map(importlib.import_module, modules):
        for name in sorted(filter(lambda name: callable(vars(module)[name]), vars(module))):
            head, *rest = re.split(r"\n\s*\n", inspect.getdoc(vars(module)[name]) or "")
            prose = []
            for paragraph in rest:
                if re.search(stop, paragraph):
                    break
                prose.append(paragraph)
            text, title = (re.sub(r"(:\w+:)?`+", "", " ".join(x.split())) for x in (" ".join(prose), head))
            if 30 <= len(text.split()) <= 60 and 4 <= len(title.split()) <= 14 and "(" not in title:
                found[text] = title
    order = np.random.default_rng(0).permutation(len(found))
    every = [Article(text=text, title=title) for text, title in sorted(found.items())]
    return [every[i] for i in order]


def question(article: Article) -> list[dict[str, str]]:
    """Return the chat that asks for a summary."""
    return [{"role": "user", "content": f"Summarize this in one short sentence.\n\n{article['text']}"}]


def longest_run(summary: str, article: str) -> int:
    """Return the length of the longest run of words that both have."""
    words, others = (re.findall(r"\w+", text.lower()) for text in (summary, article))
    return SequenceMatcher(None, words, others, autojunk=False).find_longest_match().size


def similarity(texts: list[str], others: list[str]) -> np.ndarray:
    """Return the cosine of the embeddings of each text and its other one."""
    every = list(dict.fromkeys([*texts, *others]))
    vectors = dict(zip(every, rewards.sentence_embeddings(every), strict=True))
    return np.array([float(vectors[a] @ vectors[b]) for a, b in zip(texts, others, strict=True)])


def summary(completions: list[str], article: list[str], **columns: object) -> list[float]:
    """Return the reward; the column ``article`` holds the articles' texts."""
    words = np.array([len(text.split()) for text in completions])
    runs = np.array([longest_run(*pair) for pair in zip(completions, article, strict=True)])
    price = PER_WORD * words + PER_COPIED * np.maximum(runs - FREE_RUN, 0)
    return list(similarity(completions, article) - price)


REWARD = rewards.Reward(summary, conversational=False)  # of texts, not messages


def figures(posterior: Posterior, weights: np.ndarray, some: list[Article]) -> dict[str, np.ndarray]:
    """Return figures of each article, by weights (chain, draw, prompt)."""
    texts, cut = posterior.texts["completion"], posterior.truncated["completion"]
    flat = [str(text) for text in texts.ravel()]
    bodies, titles = (
        [some[i][name] for i in range(len(some))] * (texts.size // len(some)) for name in ("text", "title")
    )
    values = {
        "reward": np.array(summary(flat, article=bodies)),
        "meaning": similarity(flat, bodies),
        "reference": similarity(flat, titles),
        "words": np.array([len(text.split()) for text in flat], dtype=float),
        "copied run": np.array([longest_run(*pair) for pair in zip(flat, bodies, strict=True)], dtype=float),
        "cut off": cut.ravel().astype(float),
    }
    return {name: (x.reshape(texts.shape) * weights).sum((0, 1)) for name, x in values.items()}


def best(posterior: Posterior) -> np.ndarray:
    """Return weights of 1 at the draw of highest reward, a prompt."""
    r = posterior.rewards["reward"]
    return (r == r.max((0, 1))) / (r == r.max((0, 1))).sum((0, 1))


def draw_picture(path: Path, rows: dict[str, dict[str, np.ndarray]]) -> None:
    from matplotlib import pyplot

    names = ["meaning", "reference", "words", "copied run"]
    figure, every = pyplot.subplots(1, len(names), figsize=(11, 3), layout="constrained", sharey=True)
    for axes, name in zip(every, names, strict=True):
        for i, values in enumerate(rows.values()):
            axes.errorbar(values[name].mean(), -i, xerr=stderr(values[name]), fmt="o", capsize=3)
        axes.set_title(name)
    every[0].set_yticks(-np.arange(len(rows)), list(rows))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None, lm: LanguageModel | None = None) -> list[str]:
    options = parser(__doc__, "summaries")
    options.add_argument("--steps", type=count, default=STEPS, help="of the training")
    chosen = options.parse_args(arguments)
    quick, started = chosen.quick, time.perf_counter()
    warnings.simplefilter("ignore", DiagnosticsWarning)  # a few draws are weighted, to be compared with one
    lm = lm or LanguageModel.from_pretrained("smollm2")
    every = articles(SOURCES[:1] if quick else SOURCES)
    train, held_out = (every[:4], every[4:7]) if quick else (every[HELD_OUT:][:TRAIN], every[:HELD_OUT])
    longest, steps = (6, 2) if quick else (LONGEST, chosen.steps)
    print(f"{len(every)} articles, {len(train)} to train on, {len(held_out)} held out")

    prior, prompts, bodies = lm.packed(), [question(a) for a in held_out], [a["text"] for a in held_out]
    target = TiltedLM(prior, REWARD, BETA, max_new_tokens=longest)
    before = ImportanceSampling(DRAWS, 1, seed=0).run(target, prompts, article=bodies)
    equal = np.full(before.log_weights.shape, 1 / DRAWS)
    found = {"prior": figures(before, equal, held_out)}
    found["posterior"] = figures(before, before.weights(), held_out)
    found[f"best of {DRAWS}"] = figures(before, best(before), held_out)

    short = rewards.Grammar(regex=rf"\s*\S+(\s+\S+){{0,{MOST_WORDS - 1}}}")
    smc = SMC(DRAWS, 1, twist=short, seed=0).run(TiltedLM(prior, short, 1.0, max_new_tokens=longest), prompts)

    model = TiltedLM(lm, REWARD, BETA, max_new_tokens=longest, subsample_size=2)
    settings = {"num_samples": 1, "num_prior_samples": 0, "checkpoint": chosen.folder / "svi", "seed": 0}
    svi = SVI(steps, PARTICLES, **settings)
    policy = svi.run(model, [question(a) for a in train], article=[a["text"] for a in train]).policy
    after = ImportanceSampling(DRAWS, 1, guide=policy.packed(), seed=0).run(target, prompts, article=bodies)
    found["policy"] = figures(after, equal, held_out)
    found["SMC, short"] = figures(smc, smc.weights(), held_out)
    found["policy − prior, paired"] = {name: found["policy"][name] - x for name, x in found["prior"].items()}

    rows = {name: [mean(x, 3 if i < 3 else 1) for i, x in enumerate(row.values())] for name, row in found.items()}
    lines = table(rows, ["held out", *found["prior"]])
    for i in range(2):
        lines += ["", held_out[i]["text"], f"- a person: {held_out[i]['title']}"]
        for name, posterior in {"prior": before, "policy": after, "SMC, short": smc}.items():
            lines.append(f"- {name}: {posterior.resample(1).texts['completion'][0, 0, i].strip()}")
    write(chosen.folder, lines, started)
    draw_picture(chosen.folder / "summaries.png", {name: row for name, row in found.items() if "−" not in name})
    return lines


if __name__ == "__main__":
    main()
