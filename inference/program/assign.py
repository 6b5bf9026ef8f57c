"""Latents of a program that are given their values, where it would draw them."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .program import Program


class Assign(Messenger):
    """Gives latent sites their values instead of sampling them.

    :param values: (particle, *batch, *event) by site; a site that is not among them is sampled as ever.
    :param token_scores: (particle, *batch, token) of completions whose log p is known: where their prompts are those
        of the first look, so that particles cannot have changed their law, the network does not score them again.
    """

    def __init__(
        self, program: Program, values: dict[str, Tensor], token_scores: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._program = program
        self._values = {name: program.under_plate(name, value) for name, value in values.items()}
        scores = token_scores or {}
        self._scores = {name: program.under_plate(name, scores[name]) for name in scores if name in values}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._values or msg["value"] is not None:
            return
        msg["value"] = self._values[name]
        if name in self._scores and same_law(self._program, name, msg["fn"]):
            msg["fn"].know(msg["value"], self._scores[name])


def same_law(program: Program, name: str, fn: Any) -> bool:
    """Whether a completion's law is the one of the first look, whatever the particles' other values."""
    first = program.sites[name].fn
    if not isinstance(fn, Autoregressive) or fn.lm is not first.lm or fn.temperature != first.temperature:
        return False
    mask, first_mask = fn.prompt_mask, first.prompt_mask
    if mask is None or first_mask is None:
        return mask is first_mask and torch.equal(fn.prompt_ids, first.prompt_ids)
    return torch.equal(fn.prompt_ids, first.prompt_ids) and torch.equal(mask, first_mask)
