"""Prompts of a program: their names and texts, and as tensors, one for each completion of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.models.lm import Autoregressive
from bayeslm.validation import validated

from .program import Program


@validated
def prompt_labels(program: Program) -> list[str]:
    """Return the name of each prompt as errors and warnings say it: of chats the user's last turn."""
    texts, turns = prompt_texts(program), chat_turns(program)
    return turns if len(turns) == len(texts) else texts  # a part of a program's prompts has texts of its own


@validated
def prompt_texts(program: Program) -> list[str]:
    """Return the text of each prompt, if a completion site has one text a prompt, else its number."""
    if program.in_chunks:
        return of_all(program, [prompt_texts(chunk) for chunk in program.chunks])
    for site in program.completions:
        if site.fn.prompt_ids.shape[:-1].numel() == program.num_prompts:
            return site.fn.prompt_texts()
    return [str(i) for i in range(program.num_prompts)]


def chat_turns(program: Program) -> list[str]:
    """Return the last user's turn of each prompt, if the prompts are chats, or chats and texts; else an empty list.

    The prompts are that argument of the program whose turns are in the texts that the language model reads: a column
    of the reward may hold chats too.
    """
    for value in (*program.args, *program.kwargs.values()):
        if isinstance(value, list | tuple) and len(value) == program.full_size and any(map(_is_chat, value)):
            turns = [_last_turn(prompt) if _is_chat(prompt) else prompt for prompt in value]
            texts = prompt_texts(program)
            if len(texts) == len(turns) and all(map(_is_in, turns, texts)):
                return turns
    return []


def _is_in(turn: Any, text: str) -> bool:
    return isinstance(turn, str) and " ".join(turn.split()) in " ".join(text.split())


def of_all(program: Program, parts: list[list[Any]]) -> list[Any]:
    """Return the values of all prompts, from those of each of a program's `chunks`, the last of which may overlap."""
    *before, last = parts
    return [*itertools.chain(*before), *last[sum(map(len, parts)) - program.full_size :]]


def _is_chat(prompt: Any) -> bool:
    is_list = isinstance(prompt, list | tuple) and len(prompt) > 0
    return is_list and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in prompt)


def _last_turn(chat: Sequence[Mapping[str, Any]]) -> str:
    """Return the content of the user's last message, or of the last one; of a list of parts their texts."""
    turn = next((turn for turn in reversed(chat) if turn["role"] == "user"), chat[-1])
    content = turn.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    return " ".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)


def prompts_of(fn: Autoregressive, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (particle, *batch, length) of the prompt of every completion.

    :param shape: (particle, *batch).
    """
    mask = torch.ones_like(fn.prompt_ids) if fn.prompt_mask is None else fn.prompt_mask
    return of_each(fn, fn.prompt_ids, shape), of_each(fn, mask, shape)


def of_each(fn: Autoregressive, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor (*batch, n) of a distribution as (particle, *batch, n).

    :param fn: may lack the dimension of particles, where its value was replayed.
    """
    x = x.expand(*fn.batch_shape, -1)
    return x.reshape(*shape, -1) if fn.batch_shape.numel() == torch.Size(shape).numel() else x.expand(*shape, -1)


def same_prompts(ids: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> bool:
    """Return whether left-padded prompts are equal, without regard to their padding."""
    return torch.equal(*side_by_side([ids.masked_fill(mask == 0, -1), other.masked_fill(other_mask == 0, -1)]))


def side_by_side(ids: list[Tensor]) -> list[Tensor]:
    """Return tensors of ids (..., length) that are left-padded with -1 to the same length."""
    longest = max(x.shape[-1] for x in ids)
    return [pad(x, (longest - x.shape[-1], 0), value=-1) for x in ids]
