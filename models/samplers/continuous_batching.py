"""Draws by transformers' continuous batching, ``generate_batch``: in this process, with the network's own weights.

Texts of any length share a batch whose free places the next ones take, over a paged cache. The network is that of the
language model itself, adapters included, so that no weights travel and none are stale.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bayeslm.models.lm import Drawn, DrawRequest, Draws, SamplerError
from bayeslm.validation import Count, Positive, validated

PAGE = 32  # tokens in a page of the cache on a CPU; on a GPU transformers chooses


@validated
@dataclass(frozen=True)
class ContinuousBatching:
    """A sampler of ``LanguageModel(..., sampler=ContinuousBatching())``.

    A GPU with flash attention is what it is made for.

    :param rows: completions in one batch at most; None: as many as transformers fits into the memory. On a CPU, whose
        memory it does not ask for, None is 64.
    :param time_limit: seconds for each request of the run, which has the completions of all its prompts.
    :raises ImportError: if the installed transformers has no ``generate_batch`` that returns log-probabilities.
    """

    rows: Count | None = None
    time_limit: Positive = 600.0

    name = "transformers' generate_batch"

    def __post_init__(self) -> None:
        _config()

    def draw(self, request: DrawRequest) -> Draws:
        """Draw the completions of a request.

        :raises SamplerError: if the network has no ``generate_batch``, a completion fails, or at the time limit.
        """
        network: Any = request.weights.network
        network = network.get_base_model() if request.weights.has_adapters else network
        if not hasattr(network, "continuous_batching_context_manager"):
            raise SamplerError(f"{type(network).__name__} is no network of transformers: it has no generate_batch")
        inputs = [prompt for prompt, count in zip(request.prompts, request.counts, strict=True) for _ in range(count)]
        with _own_random_state(network.device), _quiet():
            found = self._generate(network, inputs, request)
        drawn = iter(found)
        return Draws([[next(drawn) for _ in range(count)] for count in request.counts], request.weights.version)

    def _generate(self, network: Any, inputs: list[list[int]], request: DrawRequest) -> list[Drawn]:
        from transformers import GenerationConfig

        generation = GenerationConfig(
            do_sample=True,
            temperature=request.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(request.eos_token_ids) or -1,
            pad_token_id=0,
        )
        longest = max(map(len, inputs)) + request.max_new_tokens
        limits: dict[str, Any] = {} if self.rows is None else {"max_requests_per_batch": self.rows}
        if network.device.type == "cpu":
            rows = min(self.rows or 64, len(inputs))
            pages = rows * (-(-longest // PAGE) + 1)
            limits = {"max_requests_per_batch": rows, "page_size": PAGE, "num_blocks": pages}
            limits["max_batch_tokens"] = max(longest, rows)
        settings = _config()(return_logprobs=True, seed=request.seed % 2**32, **limits)
        results: dict[str, Any] = {}
        end = time.monotonic() + self.time_limit
        with network.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings, timeout=5, warmup=False
        ) as manager:
            ids = manager.add_requests(inputs, max_new_tokens=request.max_new_tokens)
            while len(results) < len(ids):
                result = manager.get_result(timeout=0.2)
                if result is not None and result.error is not None:
                    raise SamplerError(f"{self.name} failed: {' '.join(result.error.split()):.300}")
                if result is not None and result.is_finished():
                    results[result.request_id] = result
                elif result is None and not manager.is_running():
                    fatal = manager.background_thread_status.fatal_error
                    raise SamplerError(f"{self.name} ended before all texts were drawn: {fatal!s:.300}")
                if time.monotonic() > end:
                    manager.stop(block=False, hard_stop=True)
                    raise SamplerError(
                        f"{self.name} has {len(results)} of {len(ids)} completions after {self.time_limit:g} s: raise "
                        "time_limit, or draw fewer"
                    )
        return [Drawn(results[i].generated_tokens, results[i].logprobs) for i in ids]


def _config() -> Any:
    """Return transformers' class of settings."""
    import transformers
    from transformers.generation import configuration_utils

    config = getattr(configuration_utils, "ContinuousBatchingConfig", None)
    if config is None or "return_logprobs" not in getattr(config, "__dataclass_fields__", {}):
        raise ImportError(
            f"ContinuousBatching needs a transformers whose generate_batch returns log-probabilities, and "
            f"{transformers.__version__} has none: pip install -U transformers"
        )
    return config


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state, which transformers seeds anew."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what transformers logs at each start and stop."""
    logger = logging.getLogger("transformers.generation")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
