"""A language model behind an OpenAI-compatible address that judges texts (Zheng et al. 2023, arXiv 2306.05685).

A batch is judged at once, by so many requests at a time. The client of the package openai repeats requests that fail on
the way or at the server, after a growing delay or as long as the server asks; here a reply that is no score is asked
for again. A verdict that arrives is on the disk before the batch is complete, if there is a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from bayeslm.chats import is_chat
from bayeslm.validation import Count, Finite, Natural, NonNegative, Positive, validated

from .function_checks import short
from .reward import Reward
from .verdicts import Verdicts

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
FIELD = re.compile(r"\{(\w+)\}")
MILLION = 1e6


@dataclass
class JudgeUsage:
    """What a judge has been asked so far."""

    replies: int = 0
    cached: int = 0
    """Verdicts that were known from the cache."""
    unparseable: int = 0
    """Replies that were no score."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@validated
@dataclass(eq=False)
class Judge(Reward):
    """The score that a language model behind an OpenAI-compatible address gives a text.

        helpful = Judge("gpt-4o-mini", "How helpful is this answer? {prompt} --- {completion} --- Say a number from 1 to
        5.",
                        scores=(1, 5), cache="verdicts.sqlite")

    The key is read from an environment variable at each call, and kept nowhere.

    :param model: the model's name at the server.
    :param instruction: the message, in which ``{prompt}``, ``{completion}`` and the names of columns in braces are
        replaced. It must say what to answer: a score alone.
    :param scores: the lowest and the highest number that may be answered, or the scores of words that may be:
        ``{"yes": 1.0, "no": 0.0}``. The reply is one of these and nothing else, but for spaces around it.
    :param base_url: the server's address.
    :param key_variable: the environment variable that has the key; None for a server that needs none.
    :param options: further arguments of the request, such as the temperature.
    :param concurrency: the most requests at a time.
    :param request_timeout: seconds that a server may be silent before the request is repeated.
    :param patience: seconds after which a verdict has failed, all requests for it included.
    :param max_retries: how often a request is repeated, and how often a reply that is no score is asked for again.
    :param unparseable: what such a reply is in the end: an error, or an abstention (see `Reward`).
    :param cache: a file of verdicts by address, model, options and message (SQLite); None for none.
    :param prices: of a million tokens of prompts and of replies, for `cost`.
    :raises ImportError: if openai is not installed.
    :raises ValueError: if a setting is out of range, the instruction has no ``{completion}``, or the address has a
        password.
    """

    model: str
    instruction: str
    scores: tuple[Finite, Finite] | Mapping[str, Finite] = (1.0, 10.0)
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    concurrency: Count = 8
    request_timeout: Positive = 60.0
    patience: Positive = 600.0
    max_retries: Natural = 4
    unparseable: Literal["error", "abstain"] = "error"
    cache: str | os.PathLike[str] | None = None
    prices: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    usage: JudgeUsage = field(default_factory=JudgeUsage, init=False, repr=False)

    def __post_init__(self) -> None:
        _openai()
        if "{completion}" not in self.instruction:
            raise ValueError(f"instruction must have {{completion}}, where the text goes, got {self.instruction!r:.60}")
        _check_options(self.options)
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url must be an address such as http://localhost:8000/v1, got {self.base_url!r:.60}")
        if address.username or address.password:
            raise ValueError("base_url must not have a name or password: the key is in an environment variable")
        values = list(self.scores.values()) if isinstance(self.scores, Mapping) else list(self.scores)
        if not values or (not isinstance(self.scores, Mapping) and not values[0] < values[1]):
            raise ValueError(f"scores must be (lowest, highest), or a score for each word, got {self.scores!r:.60}")
        self._bound(max(values), min(values))
        self._verdicts = None if self.cache is None else Verdicts(Path(self.cache))

    @property
    def cost(self) -> float:
        """What has been paid so far, by `prices`."""
        used = self.usage
        return (used.prompt_tokens * self.prices[0] + used.completion_tokens * self.prices[1]) / MILLION

    def identity(self) -> Mapping[str, Any]:
        return self._settings() | {"instruction": self.instruction, "unparseable": self.unparseable}

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Any:
        rows = [{n: c[i] if isinstance(c, list) else c for n, c in columns.items()} for i in range(len(prompts))]
        messages = [self._message(*row) for row in zip(prompts, completions, rows, strict=True)]
        key = "none" if self.key_variable is None else os.environ.get(self.key_variable, "")
        if not key:
            self._fail(f"needs a key in the environment variable {self.key_variable}", prompts[0], completions[0])
        return self._judge(messages, prompts, completions, key)

    def _settings(self) -> dict[str, Any]:
        scores = dict(self.scores) if isinstance(self.scores, Mapping) else list(self.scores)
        return {"base_url": self.base_url, "model": self.model, "scores": scores, "options": dict(self.options)}

    def _message(self, prompt: Any, completion: str, columns: Mapping[str, Any]) -> str:
        fields = {**columns, "prompt": _written(prompt), "completion": completion}

        def value(match: re.Match[str]) -> str:
            return str(fields[match[1]]) if match[1] in fields else match[0]

        return FIELD.sub(value, self.instruction)  # once: braces of texts stay

    async def _judge(
        self, messages: list[str], prompts: list[Any], completions: list[str], key: str
    ) -> list[float | None]:
        """Return the scores of messages, of which equal ones are asked once."""
        keys = [self._digest(message) for message in messages]
        place = {digest: i for i, digest in reversed(list(enumerate(keys)))}
        found: dict[str, float | None] = {}
        if self._verdicts is not None:
            found.update(self._verdicts.get(place))
            self.usage.cached += len(found)
        turns = asyncio.Semaphore(self.concurrency)

        async def ask(client: Any, digest: str) -> None:
            async with turns:
                i = place[digest]
                what: Any = await self._verdict(client, messages[i], digest, key)
                if isinstance(what, str):
                    self._fail(what, prompts[i], completions[i])
                found[digest] = what

        client = _openai().AsyncOpenAI(
            api_key=key, base_url=self.base_url, timeout=self.request_timeout, max_retries=self.max_retries
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                for digest in place.keys() - found.keys():
                    group.create_task(ask(client, digest))
        except BaseExceptionGroup as errors:  # the first; the others were cancelled
            raise errors.exceptions[0] from None
        return [found[digest] for digest in keys]

    async def _verdict(self, client: Any, message: str, digest: str, key: str) -> float | str | None:
        """Return a score; None for an abstention; or why there is none."""
        reply = ""
        try:
            async with asyncio.timeout(self.patience):
                for _ in range(self.max_retries + 1):
                    reply = await self._reply(client, message)
                    score = self._parse(reply)
                    if score is not None:
                        if self._verdicts is not None:
                            self._verdicts.put(digest, score, reply.replace(key, "***"))
                        return score
                    self.usage.unparseable += 1
        except TimeoutError:
            return f"has no verdict of {self.model!r} after {self.patience:g} s"
        except _openai().OpenAIError as error:
            what = " ".join(str(error).replace(key, "***").split())
            return f"has no verdict of {self.model!r} at {self.base_url}: {type(error).__name__}: {what:.300}"
        if self.unparseable == "abstain":
            return None
        wanted = (
            list(self.scores) if isinstance(self.scores, Mapping) else "a number from {} to {}".format(*self.scores)
        )
        shown = short.repr(reply.replace(key, "***"))
        return f"needs {wanted} from {self.model!r}, which replied {shown} and no score {self.max_retries} times before"

    async def _reply(self, client: Any, message: str) -> str:
        """Return what the model says; an empty text where the answer is not one of this interface."""
        messages = [{"role": "user", "content": message}]
        try:
            answer = await client.chat.completions.create(model=self.model, messages=messages, **self.options)
        except ValueError:  # no JSON
            return ""
        self.usage.replies += 1
        try:
            if answer.usage is not None:
                self.usage.prompt_tokens += answer.usage.prompt_tokens
                self.usage.completion_tokens += answer.usage.completion_tokens
            content = answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError):  # JSON of another shape
            return ""
        return content if isinstance(content, str) else ""

    def _parse(self, reply: str) -> float | None:
        """Return the score that a reply is, or None."""
        text = reply.strip()
        if isinstance(self.scores, Mapping):
            return self.scores.get(text)
        score = float(text) if NUMBER.fullmatch(text) else math.nan
        return score if self.scores[0] <= score <= self.scores[1] else None

    def _digest(self, message: str) -> str:
        """Return the key of a verdict in the cache."""
        settings = json.dumps(self._settings() | {"message": message}, sort_keys=True, default=repr)
        return hashlib.sha256(settings.encode("utf-8", "surrogatepass")).hexdigest()


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a request that are the judge's own, unknown to openai, or no JSON, before one is paid.

    :raises ValueError: with the option.
    """
    own = {"model", "messages", "stream", "stream_options", "n"}
    known = inspect.signature(_openai().resources.chat.completions.AsyncCompletions.create).parameters.keys() - {"self"}
    if bad := [name for name in options if name in own or name not in known]:
        what = "the judge sets itself" if bad[0] in own else "openai does not know: put it into extra_body"
        raise ValueError(f"options must not have {bad[0]!r}, which {what}")
    try:
        json.dumps(dict(options), allow_nan=False, default=repr)
    except ValueError as error:
        raise ValueError(f"options must be JSON, got {options!r:.60}: {error}") from None


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ImportError(f'this reward needs {error.name}: pip install "bayeslm[judge]"') from error
    return openai


def _written(prompt: Any) -> str:
    """Return a prompt as a text: a chat as its turns."""
    if is_chat(prompt):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return str(prompt)
