"""An OpenAI-compatible server on the loopback, whose answers are scripted, faults among them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support.loopback import QuietHandler, served


class Script:
    """What the server does at its n-th request: a status, a body or a fault; the last one repeats."""

    def __init__(self, *steps: Any) -> None:
        self.steps, self.lock = list(steps), threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.at_once = self.most_at_once = 0

    def next(self, request: dict[str, Any], key: str) -> Any:
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            return self.steps[min(len(self.requests), len(self.steps)) - 1]


def chat(content: Any) -> bytes:
    """An answer of the interface."""
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    kind = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return json.dumps(kind | {"choices": [message], "usage": usage}).encode()


def reply(content: Any) -> Callable[[QuietHandler], None]:
    """Answer with a content, or with what a function makes of the message."""

    def send(handler: Any) -> None:
        text = content(handler.request["messages"][0]["content"]) if callable(content) else content
        raw(200, chat(text))(handler)

    return send


def raw(status: int, body: bytes, **headers: str) -> Callable[[QuietHandler], None]:
    def send(handler: Any) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def cut(handler: Any) -> None:
    """Promise a body, send a part of it and close the connection."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.close()


def drop(handler: Any) -> None:
    """Close the connection without a word."""
    handler.connection.close()


def slow(seconds: float, then: Callable[[Any], None]) -> Callable[[QuietHandler], None]:
    def send(handler: Any) -> None:
        time.sleep(seconds)
        then(handler)

    return send


def drip(handler: Any) -> None:
    """Send a byte now and then, for ever: no timeout between two bytes ends it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve a script; yield the base address."""

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            self.close_connection = True
            self.request = json.loads(self.body())
            with script.lock:
                script.at_once += 1
                script.most_at_once = max(script.at_once, script.most_at_once)
            try:
                script.next(self.request, self.headers.get("Authorization", ""))(self)
            except OSError:
                pass  # the client has gone
            finally:
                with script.lock:
                    script.at_once -= 1

    with served(Handler) as address:
        yield address
