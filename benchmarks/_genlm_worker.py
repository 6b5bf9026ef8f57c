"""genlm-control's side of `genlm_control.py`, run by the Python of its own environment.

One JSON object a line: the first on stdin is the problem, every one after it asks for a run, and each gets one answer
on stdout. What genlm-control (0.4.1) does with the problem:

- `DirectTokenSampler` proposes from the language model, and a critic scores the text so far after every token.
- The critic gives a cut-off text the weight of an ended one, exp(r / beta), so that its intermediate targets are
  p(x_1:t) exp(r(x_1:t) / beta) and its last one is bayeslm's.
- `max_tokens` would force EOS at the limit and charge its probability, another target: texts of that length would be
  weighed by p(EOS | x). `terminate_when` closes them free of charge, as bayeslm's distribution of completions does.
- `_genlm.py` says how its backend is run.
"""

from __future__ import annotations

from typing import Any

from _genlm import Problem, main
from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler
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
    def __init__(self, beta: float, **problem: Any) -> None:
        self.problem = Problem(**problem)
        llm = self.problem.llm
        self.smc = SMC(direct_token_sampler(llm), critic=SentimentSoFar(llm, beta))

    def run(self, particles: int, seed: int) -> dict[str, float]:
        limit = self.problem.tokens
        seconds, sequences = self.problem.run(
            self.smc,
            particles,
            seed,
            max_tokens=limit + 1,  # never reached
            terminate_when=lambda context: len(context) == limit,
        )
        return {
            "seconds": seconds,
            # A drawn EOS is a token, the one that terminate_when adds at the limit is not.
            "tokens": sum(min(len(context), limit) for context in sequences.contexts),
            "log_evidence": float(sequences.log_ml),
        }


if __name__ == "__main__":
    main(Sampler)
