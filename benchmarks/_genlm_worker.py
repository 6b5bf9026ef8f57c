"""genlm-control's side of `genlm_control.py`, run by the Python of its own environment.

One JSON object a line: the first on stdin is the problem, every one after it asks for a run, and each gets one answer
on stdout. What genlm-control (0.4.1) does with the problem:

- `DirectTokenSampler` proposes from the language model, and a critic scores the text so far after every token.
- The critic gives a cut-off text the weight of an ended one, exp(r / beta), so that its intermediate targets are
  p(x_1:t) exp(r(x_1:t) / beta) and its last one is bayeslm's.
- `max_tokens` would force EOS at the limit and charge its probability, another target: texts of that length would be
  weighed by p(EOS | x). `terminate_when` closes them free of charge, as bayeslm's distribution of completions does.
- Its backend for Hugging Face models (AsyncTransformer; the others need a GPU or Apple silicon) at its best: all
  particles in one forward pass (its default is 20 at most), no waiting for stragglers (its default is 20 ms), equal
  prefixes evaluated once, and the prompt's keys and values cached. It has no cache for those of sampled tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


class SentimentSoFar(Potential):
    """r / beta of the text so far, r being VADER's compound sentiment."""

    def __init__(self, llm: PromptedLLM, beta: float) -> None:
        super().__init__(llm.vocab, tables=llm.tables)
        self.tokenizer, self.beta = llm.model.tokenizer, beta
        self.analyzer = SentimentIntensityAnalyzer()

    async def prefix(self, context: list[Any]) -> float:
        text = self.tokenizer.decode([token.token_id for token in context], skip_special_tokens=True)
        return self.analyzer.polarity_scores(text)["compound"] / self.beta

    complete = prefix


class Sampler:
    def __init__(
        self, model: str, prompt: list[int], eos: list[int], beta: float, tokens: int, device: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.backend = AsyncTransformer(network, AutoTokenizer.from_pretrained(model), timeout=0)
        ends = [self.backend.byte_vocab[token].byte_string for token in eos]
        llm = PromptedLLM(self.backend, prompt_ids=prompt, eos_byte_strings=ends)
        self.smc = SMC(direct_token_sampler(llm), critic=SentimentSoFar(llm, beta))
        self.prompt, self.tokens = prompt, tokens

    def run(self, particles: int, seed: int) -> dict[str, float]:
        np.random.seed(seed)  # noqa: NPY002  (resampling draws from NumPy's global state, tokens from torch's)
        torch.manual_seed(seed)
        self.backend.clear_cache()  # every run pays for its own prompt and tokens
        self.backend.batch_size = particles
        start = time.perf_counter()
        self.backend.cache_kv(self.prompt)
        sequences = asyncio.run(
            self.smc(
                n_particles=particles,
                ess_threshold=0.5,
                max_tokens=self.tokens + 1,  # never reached
                resampling_method="systematic",
                terminate_when=lambda context: len(context) == self.tokens,
            )
        )
        return {
            "seconds": time.perf_counter() - start,
            # A drawn EOS is a token, the one that terminate_when adds at the limit is not.
            "tokens": sum(min(len(context), self.tokens) for context in sequences.contexts),
            "log_evidence": float(sequences.log_ml),
        }


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # the prints of a library must not mix with the answers
    logging.disable_progress_bar()
    sampler = Sampler(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(sampler.run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
