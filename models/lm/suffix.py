"""Completions redrawn from a cut: what comes before it is kept, the rest is drawn anew.

Every prompt is prefilled once, and one more forward pass reads the kept tokens of all completions. Cuts are ragged:
each row's keys and values are then moved to the right, so that new tokens follow at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autoregressive import Autoregressive
from .decoding import Steps, write
from .network import CausalNetwork
from .prefix import Prefix, prefill


@torch.no_grad()
def redraw(law: Autoregressive, value: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Redraw completions from their cuts on.

    :param law: their law, or a policy's in its place.
    :param value: well-formed completions (*batch, max_new_tokens).
    :param cut: how many tokens to keep (*batch,); what is cut at its end, or after, is left as it is.
    :returns: completions (*batch, max_new_tokens), and the log-probabilities of their new tokens under ``law`` in
        the same shape, 0 before the cut and on padding.
    """
    shape, positions = value.shape[:-1], torch.arange(law.max_new_tokens, device=value.device)
    new, cut = value.reshape(-1, law.max_new_tokens).clone(), cut.expand(shape).reshape(-1)
    scores = torch.zeros(new.shape, dtype=torch.float32, device=new.device)
    chosen = (cut < law.lengths(new)).nonzero().squeeze(-1)
    chosen = chosen[cut[chosen].argsort(stable=True)]  # micro-batches of like cuts
    prompts = law._rows(shape)[chosen]
    for part, prefix in law.prefixes(prompts):
        rows, kept = chosen[part], cut[chosen[part]]
        prefix = _read(law, prefix, prompts[part], new[rows], kept)
        suffix = write(Steps(law, prefix, room=law.max_new_tokens - kept))
        place = (positions - kept[:, None]).clamp_min(0)
        after = positions >= kept[:, None]
        new[rows] = torch.where(after, suffix[0].gather(-1, place), new[rows])
        scores[rows] = suffix[1].gather(-1, place) * after
    return new.reshape(value.shape), scores.reshape(value.shape)


def _read(law: Autoregressive, prefix: Prefix, prompts: Tensor, tokens: Tensor, kept: Tensor) -> Prefix:
    """Prompts' prefix grown by the first ``kept[i]`` of row i's ``tokens`` (rows, max_new_tokens)."""
    network: CausalNetwork = law.lm.causal
    longest = int(kept.max())
    if longest == 0:
        return prefix
    tokens, new = tokens[:, :longest], torch.arange(longest, device=tokens.device)
    ids, mask = law.flat_prompts
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask[prompts], (new < kept[:, None]).to(mask)], -1)
    # row i moves right by longest - kept[i]: what it does not keep becomes padding on the left
    length = mask.shape[-1]
    moved = (torch.arange(length, device=tokens.device) - (longest - kept)[:, None]) % length
    ragged = bool((kept < longest).any())
    if ragged and any(getattr(layer, "sliding_window", length) < length for layer in prefix.cache.layers):
        # a window that has already lost what rows moved to the right would see
        return prefill(network, torch.cat([ids[prompts], tokens], -1).gather(-1, moved), mask.gather(-1, moved))
    hidden, cache = network.hidden(tokens, mask, prefix.lengths[:, None] + new, prefix.cache)
    hidden = torch.cat([prefix.hidden[:, None], hidden], 1)
    if ragged:
        mask = mask.gather(-1, moved)
        for layer in cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                setattr(layer, name, x.gather(-2, moved[:, None, :, None].expand_as(x)))
    return Prefix(hidden[torch.arange(len(kept)), kept], cache, mask, prefix.lengths + kept)
