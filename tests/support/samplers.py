"""Samplers that draw from a known distribution other than the language model's."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bayeslm.models import LanguageModel
from bayeslm.models.lm import Drawn, DrawRequest, Draws, drawing_by_samplers
from bayeslm.models.lm.encoding import Vocabulary


@dataclass(eq=False)
class Perturbed:
    """Draws, by the library's own decoding, from another language model or at another temperature, and says so.

    :param lm: draws in the place of the model that is asked for; None: that one's network.
    :param factor: of the temperature.
    :param says: changes a draw, for faults.
    """

    lm: LanguageModel | None = None
    factor: float = 1.0
    honest: bool = True
    says: Callable[[DrawRequest, Draws], Any] | None = None
    asked: int = 0

    name = "the engine"

    def draw(self, request: DrawRequest) -> Draws:
        self.asked += 1
        trained = [p for p in request.weights.network.parameters() if p.requires_grad]
        own = (
            LanguageModel(request.weights.network, eos_token_ids=request.eos_token_ids) if self.lm is None else self.lm
        )
        for p in trained:  # which a language model freezes
            p.requires_grad_(True)
        rows = [prompt for prompt, count in zip(request.prompts, request.counts, strict=True) for _ in range(count)]
        with drawing_by_samplers(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed % 2**32)
            dist = own(rows, request.max_new_tokens, request.temperature * self.factor)
            x = dist.sample()
            scored = dist if self.honest else own(rows, request.max_new_tokens, request.temperature)
            pairs = zip(dist.vocabulary.with_end(x), scored.token_log_prob(x).tolist(), strict=True)
            drawn = iter([Drawn(ids, log_s[: len(ids)]) for ids, log_s in pairs])
        completions = [list(itertools.islice(drawn, count)) for count in request.counts]
        draws = Draws(completions, request.weights.version)
        return draws if self.says is None else self.says(request, draws)


@dataclass(eq=False)
class Elsewhere:
    """An engine with a copy of the weights of each request, by which it draws in any thread.

    :param lag: it draws by the weights of so many requests before.
    :param seconds: that a request takes.
    :param dies_at: the request that fails, counted from 0.
    """

    lag: int = 0
    seconds: float | Callable[[int], float] = 0.0
    dies_at: int | None = None
    given: list[tuple[Any, torch.nn.Module]] = field(default_factory=list)

    name = "the engine"

    def draw(self, request: DrawRequest) -> Draws:
        return self.prepare(request)()

    def prepare(self, request: DrawRequest) -> Callable[[], Draws]:
        number = len(self.given)
        self.given.append((request.weights.version, copy.deepcopy(request.weights.network)))
        version, network = self.given[max(0, number - self.lag)]

        def draw() -> Draws:
            time.sleep(self.seconds(number) if callable(self.seconds) else self.seconds)
            if number == self.dies_at:
                raise ConnectionError("nobody answers")
            generator = torch.Generator().manual_seed(request.seed)
            asked = zip(request.prompts, request.counts, strict=True)
            return Draws([self._some(network, prompt, n, request, generator) for prompt, n in asked], version)

        return draw

    @staticmethod
    @torch.no_grad()
    def _some(network: Any, prompt: list[int], n: int, request: DrawRequest, generator: torch.Generator) -> list[Drawn]:
        ids, log_s = torch.tensor([prompt] * n), torch.zeros((n, 0))
        for _ in range(request.max_new_tokens):
            logits = network(input_ids=ids).logits[:, -1].float() / request.temperature
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids, log_s = torch.cat([ids, token], 1), torch.cat([log_s, logits.log_softmax(-1).gather(1, token)], 1)
        drawn = []
        for text, scores in zip(ids[:, len(prompt) :].tolist(), log_s.tolist(), strict=True):
            ends = [t for t, token in enumerate(text) if token in request.eos_token_ids]
            length = ends[0] + 1 if ends else len(text)
            drawn.append(Drawn(text[:length], scores[:length]))
        return drawn


class Enumerating:
    """Draws every completion once, as by the uniform distribution: a mean over its draws is an expectation.

    It is asked for as many completions of each prompt as there are.
    """

    name = "the enumeration"

    def draw(self, request: DrawRequest) -> Draws:
        vocabulary = Vocabulary(request.vocab_size, request.eos_token_ids, 0)
        rows = vocabulary.with_end(vocabulary.completions(request.max_new_tokens, torch.device("cpu")))
        every = [Drawn(ids, [-math.log(len(rows)), *[0.0] * (len(ids) - 1)]) for ids in rows]
        assert {*request.counts} == {len(rows)}
        return Draws([every for _ in request.prompts], request.weights.version)
