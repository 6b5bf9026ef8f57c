r"""Log-probabilities of given completions, and their gradient in bounded memory.

Scores s_i = log p(x_i | c_i), token by token, of many completions are computed in micro-batches. Of a gradient
\sum_i g_i \nabla s_i nothing but the numbers s_i is needed until the g_i are known. So beyond one micro-batch no
activations are kept: the backward pass computes each micro-batch again, differentiates it, and adds its part (gradient
accumulation; a micro-batch is recomputed as a layer is in Chen et al. 2016, arXiv 1604.06174). Scores that the same
weights have computed already, in sampling, are not computed again: the backward pass is then the first.

A prompt with many completions goes through the network once, and its keys and values are shared (`Prefix.fork`); in the
backward pass they gather their gradient over the micro-batches, before it is propagated into the prompt. Where it is
cheaper, each completion goes through the network together with its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from .network import CausalNetwork
from .prefix import Prefix, PromptedNetwork, extend
from .truncation import Truncation
from .usage import active_usages, counting, note_mismatch

# (prompt tokens computed more than once) x width, up to which prompts are computed with every completion: a pass of
# their own would cost about as much.
PROMPTS_AGAIN = 2**14
# Elements of one float32 block of logits: 2**25 is 128 MB, about 680 tokens of a 49k vocabulary.
LOGITS_BLOCK = 2**25


def token_scores(prompted: PromptedNetwork, rows: Tensor, values: Tensor, known: Tensor | None = None) -> Tensor:
    """Return token log-probabilities (row, max_new_tokens), with a gradient if enabled and if the network is trained.

    :param rows: the prompt that each completion continues, (row,).
    :param values: completions (row, max_new_tokens).
    :param known: their scores, if these weights have computed them already.
    """
    network = prompted.network
    wants_grad = torch.is_grad_enabled() and network.requires_grad
    size = prompted.max_rows_with_gradient if wants_grad else prompted.max_rows_scored
    if wants_grad and (known is not None or len(rows) > size or network.shards is not None):
        trained = [p for p in network.parameters if p.requires_grad]
        recomputed: Tensor = _Recomputed.apply(prompted, rows, values, known, *trained)
        return recomputed
    return _in_order([(part, scores) for part, scores, _ in _micro_batches(prompted, rows, values, size)])


def scores_and_hidden(prompted: PromptedNetwork, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `token_scores` without a gradient, and, of the same pass, the last hidden states before each token.

    :returns: scores (row, max_new_tokens) and hidden states (row, max_new_tokens, width), which are 0 after the end of
        the longest completion.
    """
    scores, hidden = [], []
    for part, score, states in _micro_batches(prompted, rows, values, prompted.max_rows_scored):
        scores.append((part, score))
        hidden.append((part, pad(states, (0, 0, 0, values.shape[-1] - states.shape[1]))))
    return _in_order(scores), _in_order(hidden)


def _micro_batches(
    prompted: PromptedNetwork, rows: Tensor, values: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give indices into the rows, their scores, and their hidden states."""
    for prefix, members, prompts in _blocks(prompted, rows, size):
        for part, prompt in zip(members.split(size), prompts.split(size), strict=True):
            yield part, *_score(prompted, prefix, prompt, values[part])


def _in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Concatenate the values of micro-batches, in the order of all rows."""
    if len(parts) == 1:  # it has all rows, in order
        return parts[0][1]
    order, values = zip(*parts, strict=True)
    return torch.cat(values)[torch.cat(order).argsort()]


class _Recomputed(torch.autograd.Function):
    """`token_scores` without a graph, whose backward pass computes them again."""

    @staticmethod
    def forward(
        ctx: Any, prompted: PromptedNetwork, rows: Tensor, values: Tensor, known: Tensor | None, *trained: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, values, known, *trained)
        ctx.prompted, ctx.weights, ctx.usages = prompted, prompted.version, active_usages()
        return token_scores(prompted, rows, values) if known is None else known.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each input.

        :raises RuntimeError: if the weights have changed since they computed the scores.
        """
        prompted: PromptedNetwork = ctx.prompted
        if ctx.weights != prompted.version:
            raise RuntimeError(
                "the language model's weights were changed in place after its completions were scored, and the "
                "gradient cannot be computed: call backward() before optimizer.step(), or score the completions again"
            )
        rows, values, known, *trained = ctx.saved_tensors
        size = prompted.max_rows_with_gradient
        if prompted.network.shards is not None and not prompted.network.shares_prefill(prompted.prompt_mask):
            size = 1  # texts of several lengths would be several passes
        sums: list[Tensor | None] = [None] * len(trained)
        with torch.enable_grad(), counting(ctx.usages):
            for prefix, members, prompts in _blocks(prompted, rows, size):
                start, roots, leaves = (None, [], []) if prefix is None else prefix.detached()
                block = sums + [None] * len(leaves)
                for part, prompt in zip(members.split(size), prompts.split(size), strict=True):
                    if prompted.network.shards is None:
                        scores, _ = _score(prompted, start, prompt, values[part])
                        if scores.requires_grad:
                            block = _add(block, [scores], [*trained, *leaves], [grad[part]])
                    else:
                        scores, parts = _sharded_gradient(prompted, prompt, values[part], grad[part], trained)
                        block = _sums(block, parts)
                    if known is not None:
                        note_mismatch(scores.detach() - known[part], prompted.vocabulary.is_live(values[part]))
                sums, gathered = block[: len(trained)], block[len(trained) :]
                reached = [(root, g) for root, g in zip(roots, gathered, strict=True) if g is not None]
                if reached:
                    sums = _add(sums, [root for root, _ in reached], trained, [g for _, g in reached])
        return (None, None, None, None, *sums)


def _add(sums: list[Tensor | None], outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Any:
    """Return ``sums`` plus the gradient of sum(outputs * grads); None where there is none."""
    return _sums(sums, torch.autograd.grad(outputs, inputs, grads, allow_unused=True))


def _sums(sums: list[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, parts, strict=True)]


def _sharded_gradient(
    prompted: PromptedNetwork, prompts: Tensor, values: Tensor, grad: Tensor, trained: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the scores of a micro-batch of a sharded network, and their gradient in its trained weights."""
    scores = torch.zeros(values.shape, device=values.device)
    if not prompted.vocabulary.is_live(values).any():  # no pass
        return scores, [None] * len(trained)

    def compute() -> Tensor:
        nonlocal scores
        scores, _ = _score(prompted, None, prompts, values)
        return scores

    assert prompted.network.shards is not None
    parts = prompted.network.shards.gradient(compute, grad, trained)
    return scores, parts


def _blocks(prompted: PromptedNetwork, rows: Tensor, size: int) -> Iterator[tuple[Prefix | None, Tensor, Tensor]]:
    """Give the prefix of some prompts, the indices of the rows that continue them, and the prompt of each.

    A prefix of None: prompts are to go through the network together with their completions.
    """
    again = len(rows) * prompted.prompt_ids.shape[-1] - prompted.tokens_read
    together = prompted.gradient_checkpointing or again * max(prompted.network.width, 1) <= PROMPTS_AGAIN
    together |= prompted.network.shards is not None and torch.is_grad_enabled()
    if together or not prompted.network.shares_prefill(prompted.prompt_mask):
        yield None, torch.arange(len(rows), device=rows.device), rows
    else:
        yield from prompted.blocks(rows, min(size, prompted.max_prompts))


def _score(prompted: PromptedNetwork, prefix: Prefix | None, prompts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return token log-probabilities (row, max_new_tokens), and the hidden states before each token.

    :param prefix: processed prompts, or None.
    :param prompts: the row of the prefix, or the prompt, that each completion continues, (row,).
    :param values: completions (row, max_new_tokens).
    :returns: hidden states (row, longest, width), as many as the longest of the completions has tokens.
    """
    network, vocabulary = prompted.network, prompted.vocabulary
    live = vocabulary.is_live(values)
    ids = values.clamp(0, vocabulary.size - 1)
    malformed = ~vocabulary.is_well_formed(values)
    longest = int(live.any(0).sum())  # columns that are padding in every row need no forward pass
    if longest == 0:  # no rows, or beginnings of no tokens
        scores = torch.zeros(values.shape, device=values.device).masked_fill(malformed, -torch.inf)
        return scores, scores.new_zeros((len(values), 0, network.width))
    inputs = ids[:, : longest - 1]
    prefix = None if prefix is None else prefix.fork(prompts)
    if prefix is None:  # as `_hidden`, without a call more on the path that most runs take
        mask = None if prompted.prompt_mask is None else prompted.prompt_mask[prompts]
        hidden = network.hidden_after(prompted.prompt_ids[prompts], mask, inputs, prompted.gradient_checkpointing)
    else:
        hidden = _hidden(prompted, prefix, prompts, inputs)
    at = live.nonzero(as_tuple=True)  # found once, also for the backward pass: the host waits for a device here
    of = None
    if prompted.truncating is not None:
        with torch.no_grad():
            other = _hidden(prompted.truncating, None if prefix is None else prefix.truncating, prompts, inputs)
        of = (prompted.truncating.network, other[at])
    scores = scores_at(network, hidden[at], ids[at], prompted.temperature, prompted.truncation, of)
    scores = scores.new_zeros(values.shape).index_put(at, scores)
    if prompted.taken is not None:
        taken = prompted.taken[prompts] if prefix is None else prefix.taken
        assert taken is not None
        written = live.sum(-1)
        ends_at_once = ((written == 1) & (values[:, 0] == vocabulary.eos_token_ids[0])) | (written == 0)
        scores = torch.where(taken[:, None], scores, torch.where(ends_at_once, 0.0, -torch.inf)[:, None])
        scores = torch.where(taken[:, None] | (torch.arange(values.shape[-1]) == 0).to(taken), scores, 0.0)
    return scores.masked_fill(malformed, -torch.inf), hidden


def _hidden(prompted: PromptedNetwork, prefix: Prefix | None, prompts: Tensor, inputs: Tensor) -> Tensor:
    """Return hidden states (row, 1 + tokens, width) after prompts and after each of ``inputs`` that continue them.

    :param prefix: the prompts of the rows, one a row, which grows; None: they are read with their completions.
    :param prompts: the prompt of each row, (row,).
    :param inputs: (row, tokens).
    """
    if prefix is None:
        mask = None if prompted.prompt_mask is None else prompted.prompt_mask[prompts]
        ids, checkpointed = prompted.prompt_ids[prompts], prompted.gradient_checkpointing
        return prompted.network.hidden_after(ids, mask, inputs, checkpointed)
    if inputs.shape[-1] == 0:
        return prefix.hidden[:, None]
    return torch.cat([prefix.hidden[:, None], extend(prompted.network, prefix, inputs)], dim=1)


def scores_at(
    network: CausalNetwork,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    of: tuple[CausalNetwork, Tensor] | None = None,
) -> Tensor:
    """Return log p(target | hidden), (tokens,), for hidden (tokens, width) and targets (tokens,), block by block.

    With gradients, if these tokens are more than one block, the logits of a block are not kept, and the backward pass
    computes them again.

    :param of: the network by whose probabilities tokens remain, and its hidden states (tokens, width); None: this one.
    """

    def block(h: Tensor, x: Tensor, o: Tensor | None = None) -> Tensor:
        logits = network.logits(h, temperature)
        if truncation is not None:
            logits = truncation(logits, None if of is None or o is None else of[0].logits(o, temperature))
        return log_softmax_at(logits, x)

    size = max(1, LOGITS_BLOCK // network.vocab_size)
    inputs = (hidden, targets) if of is None else (hidden, targets, of[1])
    blocks = zip(*[x.split(size) for x in inputs], strict=True)
    if torch.is_grad_enabled() and len(targets) > size:
        return torch.cat([checkpoint(block, *each, use_reentrant=False) for each in blocks])
    return torch.cat([block(*each) for each in blocks])


def log_softmax_at(logits: Tensor, token: Tensor) -> Tensor:
    """Return log softmax(logits), of logits (rows, vocabulary), at tokens (rows,)."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
