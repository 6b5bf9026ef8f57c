"""Translate by an encoder-decoder network trained from scratch, and align it by variational inference.

    python examples/translation.py [folder]

A small grammar writes sentences of English and of a made-up language, Tavi: its verbs come last, its adjectives after
their nouns, with which they agree in gender and number, objects have a case, and verbs agree with their subjects and
have a tense that in English the time alone says. A BART of 0.6 million weights learns 2,000 pairs, for so few steps
that its draws are often wrong. Then the likelihood exp(chrF / beta) of 400 other pairs tilts it, and `SVI` trains the
policy. The script prints chrF (sacrebleu, the extra "translation") on held-out sentences that neither training has
had: of copies of the sources, of the prior's translations, and of the policy's. It takes a minute of one core, and
writes all into the folder (default: runs/translation).
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from _figures import mean, stderr, table, write
from sacrebleu.metrics import CHRF
from transformers import BartConfig, BartForConditionalGeneration

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import word_tokenizer
from bayeslm.plots import COLOURS, PRIOR_COLOUR

PAIRS, ALIGNED, HELD_OUT = 2000, 400, 200
LONGEST = 12
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


def untrained(pairs: list[tuple[str, str]]) -> LanguageModel:
    """Return a small BART with the words of both languages."""
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    tokenizer = word_tokenizer(["<eos>", *words], "<eos>")
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    sizes = {"d_model": 96, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=len(words) + 1, forced_eos_token_id=None, **layers, **special, **sizes)
    return LanguageModel(BartForConditionalGeneration(config), tokenizer)


def figures(lm: LanguageModel, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Return held-out figures of each source, in percent: of draws, and of likely translations."""
    sources, references = ([pair[i] for pair in pairs] for i in (0, 1))
    found = {}
    for name, num_texts, temperature in (("draws", 8, 1.0), ("likely", 1, 0.05)):
        texts = lm.generate_texts(sources, num_texts, max_new_tokens=LONGEST, temperature=temperature, seed=1)
        rows = list(zip(texts, references, strict=True))
        found[f"{name}: chrF"] = 100 * np.array([chrf(own, [right] * num_texts) for own, right in rows]).mean(1)
        found[f"{name}: all right"] = 100 * np.array([[text == right for text in own] for own, right in rows]).mean(1)
    return found


def picture(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for i, ((name, values), colour) in enumerate(zip(found.items(), (PRIOR_COLOUR, COLOURS[0]), strict=True)):
        at = np.arange(len(values)) + 0.36 * i
        heights, errors = ([f(each) for each in values.values()] for f in (np.mean, stderr))
        axis.bar(at, heights, 0.34, yerr=errors, color=colour, label=name, capsize=3)
        axis.set_xticks(at - 0.18, list(values))
    axis.set(ylabel="percent, ± one standard error", ylim=(0, 105))
    axis.set_title(f"{HELD_OUT} held-out sources", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100)


def main(folder: Path) -> None:
    started = time.perf_counter()
    pairs = corpus(PAIRS + ALIGNED + HELD_OUT)
    train, align, held_out = pairs[:PAIRS], pairs[PAIRS : PAIRS + ALIGNED], pairs[PAIRS + ALIGNED :]
    print("for example:", *held_out[0], sep="\n  ")

    prior = untrained(pairs)
    sources, targets = zip(*train, strict=True)
    prior.fit(targets, sources, num_steps=180, batch_size=64, learning_rate=2e-3, seed=0)
    print(f"the prior has learned {PAIRS} pairs after {time.perf_counter() - started:.0f} s")

    model = TiltedLM(prior, reward, BETA, max_new_tokens=LONGEST, subsample_size=24)
    svi = SVI(num_steps=150, objective=ReverseKL(8), optimizer=Adam(5e-4), num_samples=4, num_prior_samples=0, seed=0)
    posterior = svi.run(model, [source for source, _ in align], reference=[target for _, target in align])

    copies = 100 * np.array(chrf(*map(list, zip(*held_out, strict=True))))
    found = {"prior": figures(prior, held_out), "policy": figures(posterior.policy, held_out)}
    rows = {name: [mean(each, 1) for each in values.values()] for name, values in found.items()}
    lines = [f"{len(held_out)} held-out sources, mean ± standard error over them; in percent", ""]
    write(folder, [*lines, *table({"copies": [mean(copies, 1), "", "", ""], **rows}, ["", *found["prior"]])], started)
    picture(found, folder / "translation.png")
    posterior.policy.save_pretrained(folder / "policy")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/translation"))
