"""Redrawing of completions from a cut: the tokens before it are kept, the rest is drawn again.

Every prompt is prefilled once, and one more forward pass processes the kept tokens of all completions. Cuts are ragged:
each row's keys and values are then moved to the right, so that new tokens follow at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autoregressive import Autoregressive
from .decoding import Decoder, generate
from .prefix import Prefix, PromptedNetwork, prefill


@torch.no_grad()
def redraw(distribution: Autoregressive, value: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Redraw completions from their cuts on.

    :param distribution: of the new tokens: the completions' own, or a policy's in its place.
    :param value: well-formed completions (*batch, max_new_tokens).
    :param cut: how many tokens to keep, (*batch,); a completion that is cut at its end, or after it, does not change.
    :returns: completions (*batch, max_new_tokens), and the log-probabilities of their new tokens in the same shape, 0
        before the cut and on padding.
    """
    prompted, length = distribution.prompted, distribution.max_new_tokens
    shape, positions = value.shape[:-1], torch.arange(length, device=value.device)
    new, cut = value.reshape(-1, length).clone(), cut.expand(shape).reshape(-1)
    scores = torch.zeros(new.shape, dtype=torch.float32, device=new.device)
    chosen = (cut < distribution.lengths(new)).nonzero().squeeze(-1)
    chosen = chosen[cut[chosen].argsort(stable=True)]  # micro-batches of like cuts
    prompts = distribution.prompt_rows(shape)[chosen]
    for part, prefix in prompted.prefixes(prompts):
        rows, kept = chosen[part], cut[chosen[part]]
        prefix = _extended(prompted, prefix, prompts[part], new[rows], kept)
        suffix = generate(Decoder(prompted, prefix, room=length - kept))
        place = (positions - kept[:, None]).clamp_min(0)
        after = positions >= kept[:, None]
        new[rows] = torch.where(after, suffix[0].gather(-1, place), new[rows])
        scores[rows] = suffix[1].gather(-1, place) * after
    return new.reshape(value.shape), scores.reshape(value.shape)


def _extended(prompted: PromptedNetwork, prefix: Prefix, prompts: Tensor, tokens: Tensor, kept: Tensor) -> Prefix:
    """Return the prefix of prompts grown by the first ``kept[i]`` of row i's ``tokens`` (row, max_new_tokens)."""
    network = prompted.network
    longest = int(kept.max())
    if longest == 0:
        return prefix
    tokens, new = tokens[:, :longest], torch.arange(longest, device=tokens.device)
    ids, mask = prompted.prompt_ids, prompted.prompt_mask
    ragged = bool((kept < longest).any())
    padded = ragged or mask is not None
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask[prompts], (new < kept[:, None]).to(mask)], -1)
    # row i moves right by longest - kept[i]: the tokens that it does not keep become padding on the left
    length = mask.shape[-1]
    moved = (torch.arange(length, device=tokens.device) - (longest - kept)[:, None]) % length
    if ragged and not (network.takes_positions and network.shares_prefill(mask)):  # nothing can be moved
        return prefill(network, torch.cat([ids[prompts], tokens], -1).gather(-1, moved), mask.gather(-1, moved))
    hidden, cache = network.hidden(tokens, mask if padded else None, prefix.lengths[:, None] + new, prefix.cache)
    hidden = torch.cat([prefix.hidden[:, None], hidden], 1)
    if ragged:
        mask = mask.gather(-1, moved)
        for layer in cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                setattr(layer, name, x.gather(-2, moved[:, None, :, None].expand_as(x)))
    return Prefix(hidden[torch.arange(len(kept)), kept], cache, mask if padded else None, prefix.lengths + kept)
