"""vLLM's OpenAI-compatible interface on the loopback, with a small network behind it, and faults on request."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from support.judge_server import raw
from support.loopback import QuietHandler, served
from torch import nn

Fault = Callable[[Any], None]


class FakeVLLM:
    """The server's side.

    It draws by its own loop over the network, at the temperature, and says the log-probabilities of that.

    :param version: that it says.
    :param processed: whether log-probabilities are those at the temperature.
    :param scale: of the logits, a server whose numbers are not the network's.
    """

    def __init__(
        self, network: nn.Module, *, version: str = "0.32.0", processed: bool = True, scale: float = 1.0
    ) -> None:
        self.networks, self.version, self.processed, self.scale = {"tiny": network}, version, processed, scale
        self.faults: dict[str, Fault] = {}  # by the last part of a path; one that is there answers
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()

    def get(self, path: str) -> Any:
        if path == "/version":
            return {"version": self.version}
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.networks]}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path.endswith("load_lora_adapter") and not path.endswith("unload_lora_adapter"):
            base = copy.deepcopy(self.networks["tiny"])
            self.networks[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"])
            return "Success"
        if path.endswith("unload_lora_adapter"):
            del self.networks[body["lora_name"]]
            return "Success"
        if not 0.0 <= body["temperature"] <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {body['temperature']}")
        assert {"min_p", "top_k", "ignore_eos", "return_tokens_as_token_ids"} <= body.keys()
        generator = torch.Generator().manual_seed(body["seed"] % 2**63)
        choices = [
            {
                "index": index,
                "text": "",
                "finish_reason": "stop",
                "logprobs": {"tokens": tokens, "token_logprobs": scores, "top_logprobs": top},
            }
            for index, (tokens, scores, top) in enumerate(self._texts(self.networks[body["model"]], body, generator))
        ]
        kind = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"]}
        return kind | {"choices": choices}

    @torch.no_grad()
    def _texts(
        self, network: Any, body: dict[str, Any], generator: torch.Generator
    ) -> list[tuple[list[str], list, list]]:
        """Draw the texts of a request together, each up to its end."""
        ids, scores, top = torch.tensor([body["prompt"]] * body["n"]), [], []
        for _ in range(body["max_tokens"]):
            logits = self.scale * network(input_ids=ids).logits[:, -1].float()
            log_p = (logits / body["temperature"]).log_softmax(-1)
            token = torch.multinomial(log_p.exp(), 1, generator=generator)
            said = log_p if self.processed else logits.log_softmax(-1)
            scores.append(said.gather(-1, token)[:, 0].tolist())
            top.append({f"token_id:{i}": float(x) for i, x in enumerate(said[0])})
            ids = torch.cat([ids, token], -1)
        found = []
        for row, of_row in zip(ids[:, len(body["prompt"]) :].tolist(), zip(*scores, strict=True), strict=True):
            length = next((t + 1 for t, token in enumerate(row) if token in body["stop_token_ids"]), len(row))
            found.append(([f"token_id:{token}" for token in row[:length]], list(of_row[:length]), top[:length]))
        return found


@contextlib.contextmanager
def serving_vllm(server: FakeVLLM) -> Iterator[str]:
    """Serve; yield the address of the interface."""

    class Handler(QuietHandler):
        def answer(self, body: Any) -> None:
            name = self.path.rpartition("/")[2]
            with server.lock:
                server.requests.append((name, body))
            try:
                if name in server.faults:
                    self.close_connection = True
                    server.faults[name](self)
                    return
                with server.lock:
                    found = server.get(self.path) if body is None else server.post(self.path, body)
                raw(200, json.dumps(found).encode())(self)
            except OSError:
                pass  # the client has gone
            except Exception as error:
                raw(400, json.dumps({"message": str(error)}).encode())(self)

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.body()))

    with served(Handler) as address:
        yield address
