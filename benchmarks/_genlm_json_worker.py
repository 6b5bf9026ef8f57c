"""genlm-control's side of `json_schema.py`, run by the Python of its own environment.

One JSON object a line, as in `_genlm_worker.py`; `_genlm.py` says how its backend is run. The schema is a
`JsonSchema` potential, coerced to the model's tokens; `AWRS` proposes from the two, and carries the weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from _genlm import Problem, main
from genlm.control import AWRS, SMC, JsonSchema, Potential


class OneObject(Potential):
    """Texts whose only closing brace is their end, and whose only opening one is their beginning."""

    async def prefix(self, context: Sequence[int]) -> float:
        text = bytes(context)
        return 0.0 if b"{" not in text[1:] and b"}" not in text[:-1] else -np.inf

    async def complete(self, context: Sequence[int]) -> float:
        return await self.prefix(context)


class Sampler:
    def __init__(self, schema: dict[str, Any], **problem: Any) -> None:
        self.problem = Problem(**problem)
        self.language, llm = JsonSchema(schema) * OneObject(list(range(256))), self.problem.llm
        self.smc = SMC(AWRS(llm, self.language.coerce(llm, f=b"".join)))

    def run(self, particles: int = 0, seed: int = 0, texts: Sequence[str] = ()) -> dict[str, Any]:
        """Return the figures of a run, or, of texts, which are in the language."""
        if not particles:
            return {"members": [asyncio.run(self.language.complete(list(text.encode()))) == 0.0 for text in texts]}
        seconds, sequences = self.problem.run(self.smc, particles, seed, max_tokens=self.problem.tokens)
        weighted = zip(sequences.contexts, sequences.log_weights, strict=True)
        return {
            "seconds": seconds,
            "tokens": sum(len(context) for context in sequences.contexts),
            "log_evidence": float(sequences.log_ml),
            "texts": [self._text(context) for context, weight in weighted if weight > -np.inf],
        }

    def _text(self, context: list[Any]) -> str:
        """Return the text of tokens, without the end."""
        parts = [token.byte_string for token in context if hasattr(token, "byte_string")]  # not the library's own EOS
        return b"".join(part for part in parts if part not in self.problem.ends).decode("utf-8", "replace")


if __name__ == "__main__":
    main(Sampler)
