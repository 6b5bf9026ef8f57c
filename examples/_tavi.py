"""A parallel corpus: a small grammar writes sentences of English and of a made-up language, Tavi.

Tavi's verbs come last, its adjectives after their nouns, with which they agree in gender and number, objects have a
case, and verbs agree with their subjects and have a tense that in English the time alone says.
"""

from __future__ import annotations

import random
from typing import NamedTuple

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


STEMS = {english: stem for *forms, stem in [*NOUNS, *VERBS, *ADJECTIVES, *NUMBERS, *TIMES] for english in forms}


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


def stems(english: str) -> str:
    """Return the Tavi stem of each word of a sentence that has one, as a dictionary gives it."""
    return " ".join(STEMS[word] for word in english.split() if word in STEMS)
