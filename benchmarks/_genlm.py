"""genlm-control (0.4.1) on one prompt, for the workers, which run in an environment that has it and not bayeslm.

Its backend for Hugging Face models (AsyncTransformer; the others need a GPU or Apple silicon) is run at its best: all
particles in one forward pass (its default is 20 at most), no waiting for stragglers (its default is 20 ms), equal
prefixes evaluated once, and the prompt's keys and values cached. It has no cache for those of sampled tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from _peer import serve
from genlm.backend.llm import AsyncTransformer
from genlm.control import PromptedLLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


class Problem:
    """A prompt, and the network that continues it.

    :param eos: the tokens that end a text.
    :param tokens: the longest text.
    """

    def __init__(
        self, model: str, prompt: list[int], eos: list[int], tokens: int, threads: int, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(threads)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.backend = AsyncTransformer(network, AutoTokenizer.from_pretrained(model), timeout=0)
        self.ends = [self.backend.byte_vocab[token].byte_string for token in eos]
        self.llm = PromptedLLM(self.backend, prompt_ids=prompt, eos_byte_strings=self.ends)
        self.prompt, self.tokens = prompt, tokens

    def run(self, smc: Any, particles: int, seed: int, **settings: Any) -> tuple[float, Any]:
        """Return the seconds of a run, which pays for its own prompt and tokens, and its sequences."""
        np.random.seed(seed)  # noqa: NPY002  (resampling draws from NumPy's global state, tokens from torch's)
        torch.manual_seed(seed)
        self.backend.clear_cache()
        self.backend.batch_size = particles
        start = time.perf_counter()
        self.backend.cache_kv(self.prompt)
        sequences = asyncio.run(
            smc(n_particles=particles, ess_threshold=0.5, resampling_method="systematic", **settings)
        )
        return time.perf_counter() - start, sequences


def main(sampler: type[Any]) -> None:
    """Make a sampler of the first line of JSON on stdin, and answer each line after it by a run."""
    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # the prints of a library must not mix with the answers
        made = sampler(**json.loads(sys.stdin.readline()))
    serve(made.run)
