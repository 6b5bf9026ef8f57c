"""Draws by vLLM behind its OpenAI-compatible server, on this machine or another (https://docs.vllm.ai).

A server for a prior and its LoRA policies is started with

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16 \
        --logprobs-mode processed_logprobs

Prompts go to it as token ids, and token ids with their log-probabilities come back, so that no text is encoded twice. A
policy goes as a folder of adapters, under a new name whenever its weights have changed; those before are unloaded once
nothing is drawn by them (with `Ahead(k)` the server needs ``--max-loras`` k + 1).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bayeslm.models.lm import Drawn, DrawRequest, Draws, SamplerError, Weights
from bayeslm.validation import Count, Positive, validated

from .versions import DEPARTED, NEEDS_PROCESSED, check_version

T = TypeVar("T")
LARGEST = 32  # completions of a prompt that one request asks for
NEUTRAL = {  # whatever the model's own generation config says; and token ids in the place of texts
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "return_tokens_as_token_ids": True,
}


@validated
@dataclass(eq=False)
class VLLMServer:
    """A sampler: ``LanguageModel.from_pretrained("...", sampler=VLLMServer("http://localhost:8000/v1"))``.

    The server must have the same network and tokenizer; in which precision, the draws' own density takes care of. A key
    is read from an environment variable at each call, and kept nowhere.

    :param address: of the server's interface.
    :param model: the network's name there; None: the first one that it has.
    :param adapters: a folder that this process and the server both see, for adapters; None: a temporary one, on the
        server's machine.
    :param concurrency: the most requests at a time; each asks for up to 32 completions of a prompt.
    :param time_limit: seconds for each request. A request that takes longer is an error, and is not repeated: long
        texts would be missing among the draws.
    :param max_retries: how often a request is repeated that the server refuses or that does not reach it.
    :param key_variable: the environment variable that has the key; None for a server that needs none.
    :raises ImportError: if openai is not installed.
    :raises ValueError: if a setting is out of range, or the address has a password.
    """

    address: str = "http://localhost:8000/v1"
    model: str | None = None
    adapters: str | os.PathLike[str] | None = None
    concurrency: Count = 64
    time_limit: Positive = 600.0
    max_retries: int = 2
    key_variable: str | None = None
    _base: str | None = field(default=None, init=False, repr=False)
    _processed: bool | None = field(default=None, init=False, repr=False)
    _loaded: tuple[Hashable, str] | None = field(default=None, init=False, repr=False)
    _uses: dict[str, set[object]] = field(default_factory=dict, init=False, repr=False)  # by the names of adapters

    def __post_init__(self) -> None:
        _openai()
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"address must be one such as http://localhost:8000/v1, got {self.address!r:.60}")
        if parts.username or parts.password:
            raise ValueError("address must not have a name or password: the key is in an environment variable")
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {self.max_retries}")

    @property
    def name(self) -> str:
        """The engine and its address."""
        return f"vLLM at {self.address}"

    def draw(self, request: DrawRequest) -> Draws:
        """Draw the completions of a request; the first one checks the server.

        :raises SamplerError: if the server cannot be reached, is of a version that is not supported, cannot load an
            adapter, does not return log-probabilities of what it draws, fails, or takes too long.
        """

        async def at_once(client: Any) -> Draws:
            use = await self._ready(client, request)
            try:
                return await self._all(client, use.model, request)
            finally:
                use.end()

        return _run(self._with_client(at_once))

    def prepare(self, request: DrawRequest) -> Callable[[], Draws]:
        """Load the request's adapter, and return what draws by it, also while that of a later request is loaded.

        :raises SamplerError: see `draw`.
        """
        use = _run(self._with_client(lambda client: self._ready(client, request)))

        def draw() -> Draws:
            try:
                return _run(self._with_client(lambda client: self._all(client, use.model, request)))
            finally:
                use.end()

        return draw

    async def _with_client(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        key = "none" if self.key_variable is None else os.environ.get(self.key_variable, "")
        if not key:
            raise SamplerError(f"{self.name} needs a key in the environment variable {self.key_variable}")
        client = _openai().AsyncOpenAI(
            api_key=key, base_url=self.address, timeout=2 * self.time_limit, max_retries=self.max_retries
        )
        async with client:
            try:
                return await work(client)
            except _openai().OpenAIError as error:
                what = " ".join(str(error).replace(key, "***").split())
                raise SamplerError(f"{self.name} failed: {type(error).__name__}: {what:.300}") from error

    async def _ready(self, client: Any, request: DrawRequest) -> _Use:
        """Check the server, and return the use of the name that it has for the request's weights."""
        if self._base is None:
            self._base = await self._check(client)
        if request.temperature != 1.0 and self._processed is None:
            self._processed = await self._is_processed(client, self._base, request)
        if request.temperature != 1.0 and not self._processed:
            raise SamplerError(
                f"{self.name} {NEEDS_PROCESSED.format(request.temperature)}: start the server with "
                "--logprobs-mode processed_logprobs"
            )
        return _Use(await self._published(client, request.weights), self._uses)

    async def _check(self, client: Any) -> str:
        """Return the network's name, after a look at the version."""
        parts = urlsplit(self.address)
        try:
            answer = await self._within(client.get(f"{parts.scheme}://{parts.netloc}/version", cast_to=str))
            wrong = check_version(str(json.loads(answer)["version"]))
        except (_openai().APIStatusError, ValueError, KeyError, TypeError):
            wrong = check_version("")
        if wrong:
            raise SamplerError(f"{self.name} {wrong}")
        models = [str(each.id) for each in (await self._within(client.models.list())).data]
        model = models[0] if self.model is None and models else str(self.model)
        if model not in models:
            raise SamplerError(f"{self.name} has no model {model!r}: it has {models}")
        return model

    async def _is_processed(self, client: Any, model: str, request: DrawRequest) -> bool:
        """Return whether log-probabilities are those at the temperature: it divides those of two tokens' distance."""
        distances = []
        for temperature in (1.0, request.temperature):
            one = request._replace(max_new_tokens=1, temperature=temperature)
            answer = await self._ask(client, model, request.prompts[0], 1, one, 0, logprobs=2)
            try:
                first, second = sorted(answer.choices[0].logprobs.top_logprobs[0].values(), reverse=True)[:2]
            except (ValueError, AttributeError, TypeError, LookupError) as error:
                raise SamplerError(f"{self.name} answers with what is no completion: {error!r:.200}") from error
            distances.append(first - second)
        plain, at_temperature = distances
        return bool(abs(at_temperature - plain / request.temperature) < abs(at_temperature - plain))

    async def _published(self, client: Any, weights: Weights) -> str:
        """Return the name that the server has for weights, to which it is given adapters that it does not have yet."""
        assert self._base is not None
        if weights.departed:
            raise SamplerError(f"{self.name} {DEPARTED}")
        if not weights.has_adapters:
            return self._base
        if self._loaded is not None and self._loaded[0] == weights.version:
            return self._loaded[1]
        name = f"bayeslm-{uuid.uuid4().hex[:12]}"
        parent = Path(tempfile.gettempdir() if self.adapters is None else self.adapters)
        folder = parent / name
        weights.save(folder)
        try:
            body = {"lora_name": name, "lora_path": str(folder.resolve())}
            await self._within(client.post("/load_lora_adapter", cast_to=str, body=body))
        except _openai().APIStatusError as error:
            what = " ".join(str(error).split())
            raise SamplerError(
                f"{self.name} cannot load the policy's adapter: {what:.300}. Start it with --enable-lora, "
                "--max-lora-rank not below the policy's rank, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; it reads the "
                f"adapter from {parent}, which must be the same folder for it"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the server has read it
        self._loaded = (weights.version, name)
        for old in [each for each, uses in self._uses.items() if not uses and each != self._base]:
            del self._uses[old]
            with contextlib.suppress(_openai().APIStatusError):
                await self._within(client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": old}))
        self._uses[name] = set()
        return name

    async def _all(self, client: Any, model: str, request: DrawRequest) -> Draws:
        """Draw the completions of all prompts, by so many requests at a time."""
        turns, random = asyncio.Semaphore(self.concurrency), Random(request.seed)
        found: list[list[list[Drawn]]] = [[[] for _ in range(0, count, LARGEST)] for count in request.counts]

        async def ask(i: int, part: int, n: int, seed: int) -> None:
            async with turns:
                found[i][part] = await self._some(client, model, request.prompts[i], n, request, seed)

        try:
            async with asyncio.TaskGroup() as group:
                for i, count in enumerate(request.counts):
                    for part, first in enumerate(range(0, count, LARGEST)):
                        group.create_task(ask(i, part, min(LARGEST, count - first), random.getrandbits(60)))
        except BaseExceptionGroup as errors:  # the first; the others were cancelled
            raise errors.exceptions[0] from None
        return Draws([list(itertools.chain(*parts)) for parts in found], request.weights.version)

    async def _some(
        self, client: Any, model: str, prompt: list[int], n: int, request: DrawRequest, seed: int
    ) -> list[Drawn]:
        """Draw completions of one prompt by one request."""
        answer = await self._ask(client, model, prompt, n, request, seed)
        try:
            choices = sorted(answer.choices, key=lambda choice: choice.index)
            drawn = [
                Drawn([int(token.removeprefix("token_id:")) for token in each.tokens], list(each.token_logprobs))
                for each in (choice.logprobs for choice in choices)
            ]
            by = str(answer.model)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise SamplerError(f"{self.name} answers with what is no completion: {error!r:.200}") from error
        if len(drawn) != n or by != model:
            raise SamplerError(f"{self.name} was asked for {n} completions of {model!r}: it has {len(drawn)} of {by!r}")
        return drawn

    async def _ask(
        self, client: Any, model: str, prompt: list[int], n: int, request: DrawRequest, seed: int, logprobs: int = 0
    ) -> Any:
        """Return the server's answer to a request for completions of one prompt.

        :param logprobs: of how many of the likeliest tokens, besides those drawn.
        """
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            n=n,
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=1.0,
            seed=seed,
            logprobs=logprobs,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            extra_body=NEUTRAL | {"stop_token_ids": list(request.eos_token_ids)},
        )
        try:
            return await self._within(answer)
        except ValueError as error:  # no JSON
            raise SamplerError(f"{self.name} answers with what is no completion: {error!r:.200}") from error

    async def _within(self, answer: Awaitable[Any]) -> Any:
        """Wait for an answer, within the time limit."""
        try:
            async with asyncio.timeout(self.time_limit):
                return await answer
        except TimeoutError:
            raise SamplerError(
                f"{self.name} has not answered after {self.time_limit:g} s: raise time_limit, or lower max_new_tokens"
            ) from None


class _Use:
    """What keeps an adapter loaded: one draw's use of it, which ends by `end`, or when nobody has this object.

    :param model: the name that the server has for the adapter.
    :param uses: of all adapters, by name.
    """

    def __init__(self, model: str, uses: dict[str, set[object]]) -> None:
        self.model, key = model, object()
        uses.setdefault(model, set()).add(key)
        self.end = weakref.finalize(self, uses[model].discard, key)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return a coroutine's result; in a thread of its own where an event loop runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ImportError(f'VLLMServer needs {error.name}: pip install "bayeslm[vllm]"') from error
    return openai
