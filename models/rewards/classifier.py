"""Any Hugging Face sequence classifier as a reward: a trained reward model, or the probability of a label."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bayeslm.chats import is_chat
from bayeslm.checksums import verify_model
from bayeslm.validation import Count, validated
from bayeslm.weight_files import check_folder

from .reward import Reward
from .text_rewards import Part, once


@validated
class Classifier(Reward):
    """The score that a sequence-classification network gives a text.

    With one label, a reward model: its logit. With several, the log-probability of one of them: a softmax
    over the labels, or a sigmoid of each where the network's config says ``multi_label_classification``.

    Prompt and completion are joined without a separator. If the prompt is a chat, the completion becomes the
    assistant's turn, or the end of it if the chat ends in one, and the classifier's own chat template writes the text.

    The network runs on its device and in its precision, without gradient; scores are float32. If its config names no
    padding token, texts go through it one at a time.

    :param model: a folder or hub name (remote code is never run), loaded to torch's default device; or a
        ``...ForSequenceClassification`` network, which is put in evaluation mode.
    :param tokenizer: the network's; needed if ``model`` is a network.
    :param label: name or index of the label; needed if there are several.
    :param output: "logit", "log_prob" or "prob"; default: the logit of one label, log_prob of several.
    :param on: judge the "text" of prompt and completion, or the "completion" alone.
    :param batch_size: texts in one forward pass.
    :param max_length: tokens after which a text is cut, on the tokenizer's ``truncation_side``; None to
        refuse texts longer than the network's limit.
    :raises ValueError: if a label or tokenizer is missing or unknown, an option does not fit the network, or
        the checkpoint has no classification head.
    :raises OSError: if there is no such checkpoint.
    :raises TypeError: if the network or the tokenizer is of another type.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        label: str | int | None = None,
        output: Literal["logit", "log_prob", "prob"] | None = None,
        on: Part = "text",
        batch_size: Count = 32,
        max_length: Count | None = None,
    ) -> None:
        self.model: Any = model if isinstance(model, nn.Module) else _load(model)
        if tokenizer is None and not isinstance(model, nn.Module):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if tokenizer is None:
            raise ValueError("a network needs its tokenizer: Classifier(network, tokenizer)")
        if not hasattr(tokenizer, "model_max_length"):
            raise TypeError(f"Classifier: tokenizer must be one of transformers, got {tokenizer!r:.60}")
        config: Any = getattr(self.model, "config", None)
        if not hasattr(config, "num_labels"):
            raise TypeError(
                "Classifier: model must be a ...ForSequenceClassification network of transformers, got a "
                f"{type(self.model).__name__}"
            )
        self.model.eval()
        self.tokenizer: Any = tokenizer
        self.on, self.batch_size, self.max_length = on, batch_size, max_length
        self._label = _index(label, config)
        self._pad_token_id: int | None = getattr(config.get_text_config(), "pad_token_id", None)
        self._longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
        if max_length is not None and max_length > self._longest:
            raise ValueError(f"max_length must be in 1..{self._longest}, got {max_length}")
        self.output = output or ("logit" if config.num_labels == 1 else "log_prob")
        if self.output != "logit":
            if config.num_labels == 1:
                raise ValueError(f"a network with one label gives a logit, not output={output!r}")
            bounds = {"log_prob": (0.0, None), "prob": (1.0, 0.0)}
            self._bound(*bounds[self.output])

    def score(self, prompts: list[Any], completions: list[str], **columns: Any) -> Sequence[float]:
        rows = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        return once(self._score_rows, rows)

    def _encode(self, prompt: Any, completion: str) -> tuple[int, ...]:
        """Return the token ids of the text to judge."""
        chat = False
        if self.on == "completion":
            text = completion
        elif isinstance(prompt, str):
            text = prompt + completion
        elif is_chat(prompt):
            chat = True
            text = self.tokenizer.apply_chat_template(_with_answer(prompt, completion), tokenize=False)
        else:
            raise TypeError("token ids are another tokenizer's: give prompts as texts, or judge on='completion'")
        ids = self.tokenizer(
            text,
            add_special_tokens=not chat,  # a template writes them itself
            truncation=self.max_length is not None,
            max_length=self.max_length,
            verbose=False,
        )["input_ids"]
        if len(ids) > self._longest:
            raise ValueError(
                f"a text of {len(ids)} tokens is longer than the network's {self._longest}: set max_length to cut it"
            )
        if not ids:
            raise ValueError("the tokenizer makes no token of the text")
        return tuple(ids)

    def _score_rows(self, rows: list[tuple[int, ...]]) -> list[float]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # so that little is padded
        size = self.batch_size if self._pad_token_id is not None else 1
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), size):
            batch = order[start : start + size]
            for i, score in zip(batch, self._forward([rows[i] for i in batch]).tolist(), strict=True):
                scores[i] = score
        return scores

    @torch.no_grad()
    def _forward(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Scores, shape (len(rows),)."""
        device = next(self.model.parameters()).device
        ids = [torch.tensor(row, device=device) for row in rows]
        logits = self.model(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id or 0),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        ).logits.float()  # (len(rows), labels)
        if self.output == "logit":
            return logits[:, self._label]
        several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        log_prob = (F.logsigmoid(logits) if several else logits.log_softmax(-1))[:, self._label]
        return log_prob if self.output == "log_prob" else log_prob.exp()

    def __repr__(self) -> str:
        label = self.model.config.id2label[self._label]
        return f"Classifier({self.model.config.name_or_path!r}, label={label!r}, output={self.output!r})"


def _load(path: str | os.PathLike[str]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    def empty() -> nn.Module:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            network: nn.Module = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        return network

    try:
        if Path(path).is_dir():
            check_folder(Path(path), empty)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False
        )
        if Path(path).is_dir():
            verify_model(Path(path))
    except Exception as error:  # of many types, if files are damaged
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"Classifier: model {os.fspath(path)!r} cannot be loaded: {reason}") from error
    if info["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"{os.fspath(path)!r} is no trained sequence classifier: it lacks {missing}")
    network: nn.Module = model.to(torch.get_default_device())
    return network


def _with_answer(chat: Sequence[dict[str, Any]], completion: str) -> list[dict[str, Any]]:
    """Return a chat with its completion, which continues the assistant's turn if the chat ends in one."""
    *before, last = chat
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*before, {**last, "content": last["content"] + completion}]
    return [*chat, {"role": "assistant", "content": completion}]


def _index(label: str | int | None, config: Any) -> int:
    """The index of a label."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    if label is None and len(names) == 1:
        return 0
    if label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    close = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if label is not None and close else ""
    raise ValueError(f"label must be one of {', '.join(map(repr, names))}, got {label!r}{hint}")
