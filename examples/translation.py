"""Translate by an encoder-decoder network trained from scratch, and align it by variational inference.

    python examples/translation.py [--folder runs/translation] [--seeds 1]

A small grammar writes sentences of English and of a made-up language, Tavi: its verbs come last, its adjectives after
their nouns, with which they agree in gender and number, objects have a case, and verbs agree with their subjects and
have a tense that in English the time alone says. A BART of 0.6 million weights learns 2,000 pairs, for so few steps
that its draws are often wrong. Then the likelihood exp(chrF / beta) of 400 other pairs tilts it, and `SVI` trains the
policy. The script prints chrF (sacrebleu, the extra "translation") on held-out sentences that neither training has
had: of copies of the sources, and of translations of prior and policy, each a draw, the decision among eight draws
(minimum Bayes risk: the draw whose chrF to the others is highest), and a nearly likeliest one. It takes two minutes of
one core. A further seed is another corpus, with other held-out sentences, and another network and training.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from _figures import mean, over_seeds, parser, stderr, table, write
from sacrebleu.metrics import CHRF
from transformers import BartConfig, BartForConditionalGeneration

from bayeslm.decisions import ChrF
from bayeslm.inference import SVI, ImportanceSampling
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import word_tokenizer
from bayeslm.plots import COLOURS, PRIOR_COLOUR

PAIRS, ALIGNED, HELD_OUT = 2000, 400, 200
LONGEST, DRAWS = 12, 8
BETA = 0.05

# English, its plural, the Tavi stem; the gender is its last letter
NOUNS = [
    *(("dog", "dogs", "kano"), ("cat", "cats", "fela"), ("bird", "birds", "tiro"), ("horse", "horses", "hesta")),
    *(
        ("woman", "women", "mira"),
        ("man", "men", "duro"),
        ("child", "children", "pilo"),
        ("teacher", "teachers", "sena"),
    ),
    *(("house", "houses", "doma"), ("tree", "trees", "arvo"), ("river", "rivers", "flua"), ("book", "books", "libro")),
    *(
        ("boat", "boats", "nava"),
        ("stone", "stones", "petro"),
        ("flower", "flowers", "rosa"),
        ("star", "stars", "astro"),
    ),
]
ADJECTIVES = [
    *(("small", "pik"), ("big", "grot"), ("red", "ruv"), ("old", "vet"), ("young", "nov"), ("green", "verd")),
    *(("quiet", "siln"), ("white", "blank"), ("happy", "gaud"), ("cold", "frig")),
]
# English present singular, present plural, past; the Tavi stem
VERBS = [
    *(("sees", "see", "saw", "vid"), ("finds", "find", "found", "trov"), ("loves", "love", "loved", "am")),
    *(("draws", "draw", "drew", "des"), ("knows", "know", "knew", "kon"), ("buys", "buy", "bought", "komp")),
    *(("carries", "carry", "carried", "port"), ("forgets", "forget", "forgot", "oblit")),
]
NUMBERS = [("two", "du"), ("three", "tri"), ("four", "kvar"), ("five", "kvin"), ("six", "ses"), ("seven", "sep")]
TIMES = [("today", "hodi"), ("yesterday", "heri"), ("tomorrow", "morgi")]


class Phrase(NamedTuple):
    """A noun with what goes with it, in both languages."""

    english: list[str]
    tavi: list[str]
    plural: bool


def phrase(rng: random.Random, case: str) -> Phrase:
    """Write a noun phrase; in Tavi noun, adjective and number, in this order, with the case on the noun."""
    singular, plural, stem = rng.choice(NOUNS)
    number = rng.choice([None, None, *NUMBERS])
    several = number is not None or rng.random() < 0.3
    ending = stem[-1] + ("i" if several else "")
    english = [number[0] if number else "the", plural if several else singular]
    tavi = [stem + ("i" if several else "") + case]
    if rng.random() < 0.6:
        adjective, root = rng.choice(ADJECTIVES)
        english.insert(1, adjective)
        tavi.append(root + ending)
    return Phrase(english, tavi + ([number[1]] if number else []), several)


def sentence(rng: random.Random) -> tuple[str, str]:
    """Write a sentence in English and in Tavi."""
    subject, thing = phrase(rng, ""), phrase(rng, "n")
    present, presents, past, root = rng.choice(VERBS)
    moment, time_first = rng.choice(TIMES)
    verb = {"today": [presents if subject.plural else present], "yesterday": [past], "tomorrow": ["will", presents]}
    tense = {"today": "as", "yesterday": "is", "tomorrow": "os"}[moment]
    english = [*subject.english, *verb[moment], *thing.english, moment]
    tavi = [time_first, *subject.tavi, *thing.tavi, root + tense + ("t" if subject.plural else "")]
    return " ".join(english), " ".join(tavi)


def corpus(size: int, seed: int = 0) -> list[tuple[str, str]]:
    """Write pairs of sentences, no source twice."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < size:
        english, tavi = sentence(rng)
        pairs[english] = tavi
    return list(pairs.items())


def chrf(translations: list[str], references: list[str]) -> list[float]:
    """Return the chrF of each translation, between 0 and 1."""
    metric = CHRF()
    return [metric.sentence_score(a, [b]).score / 100 for a, b in zip(translations, references, strict=True)]


def reward(completions: list[str], reference: list[str], **columns: object) -> list[float]:
    """Return chrF to the reference, which is a column of the prompts."""
    return chrf(completions, reference)


def untrained(pairs: list[tuple[str, str]], seed: int = 0) -> LanguageModel:
    """Return a small BART with the words of both languages."""
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    tokenizer = word_tokenizer(["<eos>", *words], "<eos>")
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    sizes = {"d_model": 96, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    config = BartConfig(vocab_size=len(words) + 1, forced_eos_token_id=None, **layers, **special, **sizes)
    return LanguageModel(BartForConditionalGeneration(config), tokenizer)


def figures(lm: LanguageModel, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Return held-out figures of each source, in percent: of draws, of decisions among them, and of likely texts."""
    sources, references = ([pair[i] for pair in pairs] for i in (0, 1))
    drawn = ImportanceSampling(DRAWS, 1, seed=1).run(TiltedLM(lm, None, max_new_tokens=LONGEST), sources)
    texts = {
        "draws": drawn.texts["completion"][0].T.tolist(),  # of each source its draws
        "decided": [[text] for text in drawn.decide(ChrF()).texts],
        "likely": lm.generate_texts(sources, max_new_tokens=LONGEST, temperature=0.05, seed=1),
    }
    found = {}
    for name, of_sources in texts.items():
        rows = list(zip(of_sources, references, strict=True))
        found[f"{name}: chrF"] = 100 * np.array([np.mean(chrf(own, [right] * len(own))) for own, right in rows])
        found[f"{name}: all right"] = 100 * np.array([np.mean([text == right for text in own]) for own, right in rows])
    return found


def one_seed(seed: int, quick: bool, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return held-out figures of copies of the sources, of the prior, and of the policy, which the folder gets."""
    sizes = (64, 24, 8) if quick else (PAIRS, ALIGNED, HELD_OUT)
    pairs = corpus(sum(sizes), seed)
    train, align, held_out = (pairs[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
    print("for example:", *held_out[0], sep="\n  ")

    prior = untrained(pairs, seed)
    sources, targets = zip(*train, strict=True)
    prior.fit(targets, sources, num_steps=2 if quick else 180, batch_size=64, learning_rate=2e-3, seed=seed)

    model = TiltedLM(prior, reward, BETA, max_new_tokens=LONGEST, subsample_size=24)
    settings = {"optimizer": Adam(5e-4), "num_samples": 4, "num_prior_samples": 0, "seed": seed}
    svi = SVI(2 if quick else 150, objective=ReverseKL(8), **settings)
    posterior = svi.run(model, [source for source, _ in align], reference=[target for _, target in align])
    posterior.policy.save_pretrained(folder / "policy")

    copies = 100 * np.array(chrf(*map(list, zip(*held_out, strict=True))))
    return {
        "copies": {"draws: chrF": copies},
        "prior": figures(prior, held_out),
        "policy": figures(posterior.policy, held_out),
    }


def picture(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    for i, (name, colour) in enumerate({"prior": PRIOR_COLOUR, "policy": COLOURS[0]}.items()):
        values = found[name]
        at = np.arange(len(values)) + 0.36 * i
        heights, errors = ([f(each) for each in values.values()] for f in (np.mean, stderr))
        axis.bar(at, heights, 0.34, yerr=errors, color=colour, label=name, capsize=3)
        axis.set_xticks(at - 0.18, [each.replace(": ", ":\n") for each in values])
    axis.axhline(np.mean(found["copies"]["draws: chrF"]), color="0.4", linestyle=":", label="chrF of copies")
    axis.set(ylabel="percent, ± one standard error", ylim=(0, 105))
    axis.set_title(f"{HELD_OUT} held-out sources", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[str]:
    options = parser(__doc__, "translation")
    options.add_argument("--seeds", type=int, default=1, help="of corpus, network and training; errors are over these")
    chosen = options.parse_args(arguments)
    folder, started = chosen.folder, time.perf_counter()
    runs = [one_seed(seed, chosen.quick, folder / f"seed-{seed}") for seed in range(chosen.seeds)]
    found = {
        name: {figure: over_seeds([run[name][figure] for run in runs]) for figure in values}
        for name, values in runs[0].items()
    }
    names = list(found["prior"])
    rows = {name: [mean(x[each], 1) if each in x else "" for each in names] for name, x in found.items()}
    gains = [over_seeds([run["policy"][each] - run["prior"][each] for run in runs]) for each in names]
    rows["policy − prior, paired"] = [mean(gain, 1) for gain in gains]
    kind = f"{chosen.seeds} seeds" if chosen.seeds > 1 else "held-out sources"
    lines = [f"percent, mean ± standard error over {kind}", "", *table(rows, ["", *names])]
    write(folder, lines, started)
    picture(found, folder / "translation.png")
    return lines


if __name__ == "__main__":
    main()
