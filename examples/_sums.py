"""Sums in written steps, and a small transformer fitted to some: for `reasoning.py`, and for a benchmark."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslm.models import LanguageModel, rewards
from bayeslm.models.lm import word_tokenizer

WORDS = ["<eos>", *"0123456789", "+", "=", ":"]
LONGEST, BETA = 24, 0.25
WRITTEN, KNOWN, HELD_OUT = 3000, 400, 200  # problems
TERMS, WIDTH, FIT_STEPS = 5, 64, 500
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


def untrained(width: int, seed: int = 0) -> LanguageModel:
    """Return a small Llama over digits."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    network = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=64))
    return LanguageModel(network, word_tokenizer(WORDS, WORDS[0]))


def splits(*, quick: bool = False, extra: int = 0, seed: int = 0) -> list[list[Problem]]:
    """Return problems with written solutions, with answers, held-out ones, and further ones."""
    sizes = (20, 8, 4) if quick else (WRITTEN, KNOWN, HELD_OUT)
    found = problems(sum(sizes) + extra, 3 if quick else TERMS, seed)
    return [found[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3)] + [found[sum(sizes) :]]


def fitted(written: list[Problem], folder: Path | None, *, quick: bool = False, seed: int = 0) -> LanguageModel:
    """Return the prior. It is kept in the folder, and a second call finds it there."""
    prior = untrained(16 if quick else WIDTH, seed)
    table = {"prompt": [q for q, _, _ in written], "completion": [f"{steps} {answer}" for _, steps, answer in written]}
    settings = {"batch_size": 32, "learning_rate": 3e-3, "held_out": 0.05, "checkpoint": folder, "seed": seed}
    losses = prior.fit(table, num_steps=3 if quick else FIT_STEPS, **settings)
    print(f"the prior: {losses.held_out[losses.kept_step]:.3f} nats a token held out")
    return prior


def answer_of(text: str) -> str | None:
    """Return what stands after the colon."""
    return text.split(" : ")[1] if text.count(" : ") == 1 else None
