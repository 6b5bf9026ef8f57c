"""genlm-control's side of `json_schema.py`, run by the Python of its own environment.

One JSON object a line, as in `_genlm_worker.py`, which says how its backend is run at its best. The schema is a
`JsonSchema` potential, coerced to the model's tokens; `AWRS` proposes from the two, and carries the weights.
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
from genlm.control import AWRS, SMC, JsonSchema, PromptedLLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


class Sampler:
    def __init__(
        self, model: str, prompt: list[int], schema: dict[str, Any], eos: list[int], tokens: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.backend = AsyncTransformer(network, AutoTokenizer.from_pretrained(model), timeout=0)
        self.ends = [self.backend.byte_vocab[token].byte_string for token in eos]
        llm = PromptedLLM(self.backend, prompt_ids=prompt, eos_byte_strings=self.ends)
        self.smc = SMC(AWRS(llm, JsonSchema(schema).coerce(llm, f=b"".join)))
        self.prompt, self.tokens = prompt, tokens

    def run(self, particles: int, seed: int) -> dict[str, Any]:
        np.random.seed(seed)  # noqa: NPY002  (resampling draws from NumPy's global state, tokens from torch's)
        torch.manual_seed(seed)
        self.backend.clear_cache()  # every run pays for its own prompt and tokens
        self.backend.batch_size = particles
        start = time.perf_counter()
        self.backend.cache_kv(self.prompt)
        sequences = asyncio.run(
            self.smc(n_particles=particles, ess_threshold=0.5, max_tokens=self.tokens, resampling_method="systematic")
        )
        seconds = time.perf_counter() - start
        weighted = zip(sequences.contexts, sequences.log_weights, strict=True)
        texts = [self._text(context) for context, weight in weighted if weight > -np.inf]
        return {
            "seconds": seconds,
            "tokens": sum(len(context) for context in sequences.contexts),
            "log_evidence": float(sequences.log_ml),
            "texts": texts,
        }

    def _text(self, context: list[Any]) -> str:
        """Return the text of tokens, without the end."""
        parts = [
            token.byte_string for token in context if hasattr(token, "byte_string")
        ]  # not that of the library's EOS
        return b"".join(part for part in parts if part not in self.ends).decode("utf-8", "replace")


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # the prints of a library must not mix with the answers
    logging.disable_progress_bar()
    sampler = Sampler(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(sampler.run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
