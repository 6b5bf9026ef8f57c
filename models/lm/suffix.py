"""Redrawing of completions from a cut: the tokens before it are kept, the rest is drawn again, once or many times.

Every prompt is prefilled once, and one more forward pass processes the kept tokens of all completions, however many
times the rest is drawn. Where cuts are ragged, each row's keys and values are then moved to the right, so that new
tokens follow at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .autoregressive import Autoregressive
from .decoding import Decoder, generate
from .prefix import Prefix, PromptedNetwork, grown


@torch.no_grad()
def redraw(
    distribution: Autoregressive, value: Tensor, cut: Tensor, copies: int | None = None
) -> tuple[Tensor, Tensor]:
    """Redraw completions from their cuts on.

    :param distribution: of the new tokens: the completions' own, or a policy's in its place.
    :param value: well-formed completions (*batch, max_new_tokens).
    :param cut: how many tokens to keep, (*batch,); a completion that is cut at its end, or after it, does not change.
    :param copies: how many times to redraw each of them; None for once, without an axis of copies.
    :returns: completions (copies, *batch, max_new_tokens), and the log-probabilities of their new tokens in the same
        shape, 0 before the cut and on padding.
    """
    prompted, length = distribution.prompted, distribution.max_new_tokens
    shape, positions = value.shape[:-1], torch.arange(length, device=value.device)
    old, cut = value.reshape(-1, length), cut.expand(shape).reshape(-1)
    new = old.repeat(copies or 1, 1, 1)
    scores = torch.zeros(new.shape, dtype=torch.float32, device=new.device)
    chosen = (cut < distribution.lengths(old)).nonzero().squeeze(-1)
    chosen = chosen[cut[chosen].argsort(stable=True)]  # micro-batches of like cuts
    prompts = distribution.prompt_rows(shape)[chosen]
    for part, prefix in _batches(prompted, prompts, cut[chosen]):
        rows, kept = chosen[part], cut[chosen[part]]
        asked = prompts[part]
        mask = torch.ones_like(prompted.prompt_ids) if prompted.prompt_mask is None else prompted.prompt_mask
        texts = (prompted.prompt_ids[asked], mask[asked])
        truncating = prefix.truncating
        prefix = grown(prompted.network, *texts, prefix, old[rows], kept)
        if prompted.truncating is not None and truncating is not None:
            prefix.truncating = grown(prompted.truncating.network, *texts, truncating, old[rows], kept)
        states = _states(prompted, old[rows], kept)
        for some in torch.arange(len(rows) * len(new), device=rows.device).split(prompted.max_rows):
            copy, row = some // len(rows), some % len(rows)
            start = prefix if len(new) == 1 else prefix.fork(row)
            reached = states if states is None or len(new) == 1 else states[row]
            suffix = generate(Decoder(prompted, start, room=length - kept[row], states=reached))
            place = (positions - kept[row, None]).clamp_min(0)
            after = positions >= kept[row, None]
            new[copy, rows[row]] = torch.where(after, suffix[0].gather(-1, place), old[rows[row]])
            scores[copy, rows[row]] = suffix[1].gather(-1, place) * after
    batch = value.shape if copies is None else (copies, *value.shape)
    return new.reshape(batch), scores.reshape(batch)


def _states(prompted: PromptedNetwork, tokens: Tensor, kept: Tensor) -> Tensor | None:
    """Return the states (row,) of stop strings after the first ``kept[i]`` of row i's ``tokens``, if there are any."""
    stops = prompted.vocabulary.stops
    if stops is None:
        return None
    states = torch.cat([stops.start(len(tokens))[:, None], stops.states(tokens)], -1)
    return states.gather(-1, kept[:, None])[:, 0]


def _batches(prompted: PromptedNetwork, prompts: Tensor, cut: Tensor) -> Iterator[tuple[Tensor, Prefix]]:
    """Give micro-batches that can be cut and continued together: indices (row,), and the prefix of their prompts.

    :param prompts: the prompt of each completion, (row,).
    :param cut: how many tokens of it are kept, (row,).
    """
    for part, prefix in prompted.prefixes(prompts, min(prompted.max_rows_scored, prompted.max_rows)):
        if prompted.network.pads_tokens:
            yield part, prefix
            continue
        for kept in cut[part].unique().tolist():
            same = (cut[part] == kept).nonzero().squeeze(-1)
            yield part[same], prefix.fork(same)
