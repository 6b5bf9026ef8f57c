"""Draws by vLLM in this process, where it is installed beside bayeslm (https://docs.vllm.ai).

    engine = vllm.LLM("...", enable_lora=True, max_lora_rank=16, logprobs_mode="processed_logprobs")
    lm = LanguageModel.from_pretrained("...", sampler=VLLM(engine))

vLLM pins the versions of torch and transformers that it is built for; where these are not yours, `VLLMServer` asks an
engine in an environment of its own.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import uuid
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

from bayeslm.models.lm import Drawn, DrawRequest, Draws, SamplerError, Weights
from bayeslm.validation import Positive, Unchecked, validated

from .versions import DEPARTED, NEEDS_PROCESSED, check_version


@validated
@dataclass(eq=False)
class VLLM:
    """A sampler around a ``vllm.LLM`` of the same network and tokenizer.

    :param engine: with ``logprobs_mode="processed_logprobs"`` for other temperatures than 1, and ``enable_lora=True``
        for policies.
    :param time_limit: seconds for each request of a run, which has the completions of all its prompts; it is looked at
        after each token.
    :raises TypeError: if the engine is no ``vllm.LLM``.
    :raises ValueError: if its version is not supported.
    """

    engine: Annotated[Any, Unchecked]
    time_limit: Positive = 600.0
    _loaded: tuple[Hashable, Any, Any] | None = field(default=None, init=False, repr=False)

    name = "vLLM in this process"

    def __post_init__(self) -> None:
        if not hasattr(self.engine, "llm_engine"):
            raise TypeError(f"VLLM: engine must be a vllm.LLM, got {type(self.engine).__name__}")
        import vllm

        if wrong := check_version(vllm.__version__):
            raise ValueError(f"VLLM: vLLM {wrong}")

    def draw(self, request: DrawRequest) -> Draws:
        """Draw the completions of a request.

        :raises SamplerError: if the engine returns log-probabilities before the temperature, or at the time limit.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self.engine.llm_engine
        mode = getattr(engine.model_config, "logprobs_mode", None)
        if request.temperature != 1.0 and mode != "processed_logprobs":
            raise SamplerError(
                f"{self.name} {NEEDS_PROCESSED.format(request.temperature)}: make the engine with "
                'logprobs_mode="processed_logprobs"'
            )
        random, adapter = Random(request.seed), self._adapter(request.weights)
        start, begun = uuid.uuid4().hex, time.monotonic()
        ids = [f"{start}-{i}" for i in range(len(request.prompts))]
        for key, prompt, count in zip(ids, request.prompts, request.counts, strict=True):
            settings = SamplingParams(
                n=count,
                temperature=request.temperature,
                top_p=1.0,
                top_k=-1,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(request.eos_token_ids),
                ignore_eos=True,
                logprobs=0,
                seed=random.getrandbits(60),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(key, TokensPrompt(prompt_token_ids=prompt), settings, lora_request=adapter)
        found: dict[str, list[Drawn]] = {}
        try:
            while len(found) < len(ids):
                for output in engine.step():
                    if output.finished and output.request_id in ids:
                        found[output.request_id] = [_drawn(each) for each in output.outputs]
                if time.monotonic() - begun > self.time_limit:
                    raise SamplerError(
                        f"{self.name} has drawn for {len(found)} of {len(ids)} prompts after {self.time_limit:g} s: "
                        "raise time_limit, or draw fewer"
                    )
        finally:
            if unfinished := [key for key in ids if key not in found]:
                engine.abort_request(unfinished)
        return Draws([found[key] for key in ids], request.weights.version)

    def _adapter(self, weights: Weights) -> Any:
        """Return vLLM's request for a policy's adapter, as its weights are now; None without one."""
        from vllm.lora.request import LoRARequest

        if weights.departed:
            raise SamplerError(f"{self.name} {DEPARTED}")
        if not weights.has_adapters:
            return None
        if self._loaded is None or self._loaded[0] != weights.version:
            if self._loaded is not None:
                self.engine.llm_engine.remove_lora(self._loaded[1].lora_int_id)
            folder = tempfile.TemporaryDirectory(prefix="bayeslm-")  # which lives as long as it may be read
            weights.save(Path(folder.name))
            number = next(_numbers)
            self._loaded = weights.version, LoRARequest(f"bayeslm-{number}", number, folder.name), folder
        return self._loaded[1]


_numbers = itertools.count(1)


def _drawn(output: Any) -> Drawn:
    ids = list(output.token_ids)
    scores = [float(by_token[token].logprob) for token, by_token in zip(ids, output.logprobs, strict=True)]
    return Drawn(ids, scores)
