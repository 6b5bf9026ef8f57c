r"""Log-probabilities of completions that are given, and their gradient in bounded memory.

Scores s_i = log p(x_i | c_i), token by token, of many completions are computed in micro-batches. Of a gradient
\sum_i g_i \nabla s_i nothing but the numbers s_i is needed until the g_i are known. So beyond one micro-batch no
activations are kept: the backward pass reads each micro-batch again, differentiates it, and adds its part (gradient
accumulation; what is recomputed, as in Chen et al. 2016, arXiv 1604.06174, is a micro-batch). Of completions that the
same weights have just drawn the scores are known, and the backward pass is the first to read them: one pass, as ever.

A prompt with many completions is read once, and its keys and values are given to each (`Prefix.fork`); in the backward
pass they gather their gradient over the micro-batches before it goes on into the prompt. Where it is cheaper each
completion is read together with its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .network import counting, note_mismatch, usages
from .prefix import Prefix, extend

if TYPE_CHECKING:
    from .autoregressive import Autoregressive

# Prompts read again with every completion cost so many numbers, (tokens more) x width; prompts read in a pass of their
# own cost that pass, which is about as much.
PROMPTS_AGAIN = 2**14


def token_scores(law: Autoregressive, rows: Tensor, values: Tensor, known: Tensor | None = None) -> Tensor:
    """Token log-probabilities (rows, max_new_tokens), with a gradient if it is enabled and the network is in training.

    :param rows: which prompt each completion continues, (rows,).
    :param values: completions (rows, max_new_tokens).
    :param known: their scores, if these weights have given them already.
    """
    network = law.lm.causal
    wants_grad = torch.is_grad_enabled() and network.requires_grad
    size = law.max_rows_with_gradient if wants_grad else law.max_rows
    if wants_grad and (known is not None or len(rows) > size):
        trained = [p for p in network.parameters if p.requires_grad]
        recomputed: Tensor = _Recomputed.apply(law, rows, values, known, *trained)
        return recomputed
    return _together([(part, scores) for part, scores, _ in _parts(law, rows, values, size)])


def scores_and_hidden(law: Autoregressive, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`token_scores` without a gradient, and of the same pass the last hidden states before each token, (rows,
    max_new_tokens, width), zeros from where every completion has ended."""
    scores, hidden = [], []
    for part, score, states in _parts(law, rows, values, law.max_rows):
        scores.append((part, score))
        hidden.append((part, pad(states, (0, 0, 0, values.shape[-1] - states.shape[1]))))
    return _together(scores), _together(hidden)


def _parts(law: Autoregressive, rows: Tensor, values: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Micro-batches: which rows, their scores, and their hidden states."""
    for prefix, members, prompts in _blocks(law, rows, size):
        for part, of in zip(members.split(size), prompts.split(size), strict=True):
            yield part, *_score(law, prefix, of, values[part])


def _together(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What micro-batches have, in the order of all rows."""
    if len(parts) == 1:  # which has all of them in order
        return parts[0][1]
    order, values = zip(*parts, strict=True)
    return torch.cat(values)[torch.cat(order).argsort()]


class _Recomputed(torch.autograd.Function):
    """`token_scores` without a graph, whose backward pass computes them again."""

    @staticmethod
    def forward(
        ctx: Any, law: Autoregressive, rows: Tensor, values: Tensor, known: Tensor | None, *trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, values, known, *trained)
        ctx.law, ctx.weights, ctx.usages = law, law.lm.causal.version, usages()
        return token_scores(law, rows, values) if known is None else known.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """:raises RuntimeError: if the weights are no longer those that gave the scores."""
        law: Autoregressive = ctx.law
        if ctx.weights != law.lm.causal.version:
            raise RuntimeError(
                "the language model's weights were changed in place after its completions were scored, and the "
                "gradient is gone: call backward() before optimizer.step(), or score the completions again"
            )
        rows, values, known, *trained = ctx.saved_tensors
        size = law.max_rows_with_gradient
        sums: list[Tensor | None] = [None] * len(trained)
        with torch.enable_grad(), counting(ctx.usages):
            for prefix, members, prompts in _blocks(law, rows, size):
                begin, roots, leaves = (None, [], []) if prefix is None else prefix.cut()
                block = sums + [None] * len(leaves)
                for part, of in zip(members.split(size), prompts.split(size), strict=True):
                    scores, _ = _score(law, begin, of, values[part])
                    if scores.requires_grad:
                        block = _add(block, [scores], [*trained, *leaves], [grad[part]])
                    if known is not None:
                        note_mismatch(scores.detach() - known[part], law.is_live(values[part]))
                sums, gathered = block[: len(trained)], block[len(trained) :]
                reached = [(root, g) for root, g in zip(roots, gathered, strict=True) if g is not None]
                if reached:
                    sums = _add(sums, [root for root, _ in reached], trained, [g for _, g in reached])
        return (None, None, None, None, *sums)


def _add(sums: list[Tensor | None], outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Any:
    """``sums`` plus the gradient of sum(outputs * grads); None where there is none."""
    parts = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, parts, strict=True)]


def _blocks(law: Autoregressive, rows: Tensor, size: int) -> Iterator[tuple[Prefix | None, Tensor, Tensor]]:
    """The prefix of some prompts, which rows continue them, and which of the prompts each does.

    A prefix of None: prompts are to be read together with their completions.
    """
    length = law.prompt_ids.shape[-1]
    again = (len(rows) - law.prompt_ids[..., 0].numel()) * length
    if law.lm.gradient_checkpointing or again * max(law.lm.causal.width, 1) <= PROMPTS_AGAIN:
        yield None, torch.arange(len(rows), device=rows.device), rows
    else:
        yield from law.blocks(rows, size)


def _score(law: Autoregressive, prefix: Prefix | None, prompts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Token log-probabilities of completions (rows, max_new_tokens) that continue ``prompts`` (rows,) of a prefix, and
    the hidden states (rows, longest, width) before each token of the longest.
    """
    network = law.lm.causal
    live = law.is_live(values)
    ids = values.clamp(0, law.lm.vocab_size - 1)
    malformed = values != torch.where(live, ids, law.lm.pad_token_id)
    longest = int(live.any(0).sum())  # columns that are padding in every row need no forward pass
    if longest == 0:  # no rows
        return torch.zeros(values.shape, device=values.device), values.new_zeros((0, 0, network.width)).float()
    read = ids[:, : longest - 1]
    if prefix is None:
        prompt_ids, mask = law.flat_prompts
        length = prompt_ids.shape[-1]
        mask = None if mask is None else pad(mask[prompts], (0, longest - 1), value=1)
        whole = torch.cat([prompt_ids[prompts], read], dim=-1)
        hidden = network.read(whole, mask, law.lm.gradient_checkpointing)[:, length - 1 :]
    else:
        prefix = prefix.fork(prompts)
        hidden = prefix.hidden[:, None]
        if longest > 1:
            hidden = torch.cat([hidden, extend(network, prefix, read)], dim=1)
    scores = network.token_log_prob(hidden[live[:, :longest]], ids[live], law.temperature)
    return scores.new_zeros(values.shape).masked_scatter(live, scores).masked_fill(malformed, -torch.inf), hidden
