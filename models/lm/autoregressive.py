r"""The law of a completion given its prompt, as a Pyro distribution.

    p(x | c) = \prod_{t=1}^{\tau} p(x_t | c, x_{<t}),     \tau = min(first t with x_t = EOS, max_new_tokens)

A completion ends at its first EOS token, which counts, or at ``max_new_tokens``; after that it is padded, and
padding carries no probability. So the law is normalised over completions: every sequence that has not ended
by the limit is a completion of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape  # torch's takes ten times as long
from torch import Size, Tensor
from torch.distributions import constraints

from .decoding import Steps, write
from .prefix import Prefix, prefill
from .scoring import scores_and_hidden, token_scores

if TYPE_CHECKING:
    import numpy as np

    from .language_model import LanguageModel


class Autoregressive(TorchDistribution):
    """Completions of a batch of prompts.

    ``batch_shape`` is the prompts', or more after `expand`; ``event_shape`` is ``(max_new_tokens,)``; values
    are ``int64`` token ids.

    :param lm: the language model.
    :param prompt_ids: left-padded token ids, shape (*prompts, length).
    :param prompt_mask: 1 where a prompt token is real, same shape; None if no prompt is padded.
    :param max_new_tokens: the longest completion.
    :param temperature: divides the logits; the law is that of the tempered network.
    :raises ValueError: if ``max_new_tokens`` < 1 or ``temperature`` is not positive and finite.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False
    has_enumerate_support = True
    max_support = 2**22  # completions that `enumerate_support` will list at most

    def __init__(
        self,
        lm: LanguageModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.lm = lm
        self.prompt_ids = prompt_ids
        self.prompt_mask = prompt_mask
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._scored: tuple[Tensor, tuple[int, ...], Tensor] | None = None  # a value, versions, token scores
        super().__init__(prompt_ids.shape[:-1], Size([max_new_tokens]), validate_args=False)

    # -- the distribution ------------------------------------------------------------------------------------

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same law over a larger batch. The prompts stay as they are and are prefilled once."""
        new = self.with_model(self.lm)
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def with_model(self, lm: LanguageModel) -> Autoregressive:
        """The same prompts under another language model: how a policy takes the prior's place.

        :raises ValueError: if its completions are not this one's: another vocabulary, EOS or pad token.
        """
        for name in ("vocab_size", "eos_token_ids", "pad_token_id") if lm is not self.lm else ():
            if getattr(lm, name) != getattr(self.lm, name):
                raise ValueError(
                    f"the language models' {name} differ, {getattr(self.lm, name)} and {getattr(lm, name)}: "
                    "one cannot propose completions of the other"
                )
        new = Autoregressive(lm, self.prompt_ids, self.prompt_mask, self.max_new_tokens, self.temperature)
        TorchDistribution.__init__(new, self.batch_shape, self.event_shape, validate_args=False)
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _WellFormed(self)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        """Completions, shape (*sample_shape, *batch_shape, max_new_tokens). Their scores are kept."""
        shape = Size(sample_shape) + self.batch_shape
        rows = self._rows(shape)
        value = rows.new_full((len(rows), self.max_new_tokens), self.lm.pad_token_id)
        scores = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        passes = -(-len(rows) // self.max_rows) * (self.max_new_tokens - 1)
        with torch.no_grad(), self.lm.causal.drawing(passes):
            for part, prefix in self.prefixes(rows):
                value[part], scores[part] = write(Steps(self, prefix))
        value = value.reshape(shape + self.event_shape)
        self.know(value, scores.reshape(value.shape))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value | prompt), shape of the batch; -inf for a malformed completion."""
        return self.token_log_prob(value).sum(-1)

    def token_log_prob(self, value: Tensor, known: Tensor | None = None) -> Tensor:
        """Return log p(x_t | prompt, x_<t), shape (*batch, max_new_tokens); 0 on padding, -inf where malformed.

        A value that `sample` has just drawn is not scored again. Gradients are of first order, and take the memory of
        one micro-batch (see `scoring`).

        :param known: the same numbers, (*batch, max_new_tokens), where the same weights have computed them already.
            Without a gradient they are returned; with one, the backward pass is the first to run the network.
        :raises ValueError: for completions of another length.
        """
        wants_grad = torch.is_grad_enabled() and self.lm.causal.requires_grad
        kept = self._known(value) if known is None else known
        if kept is not None and not wants_grad:
            return kept
        rows, flat, shape = self._flat(value)
        if known is not None:
            known = known.expand(shape + self.event_shape).reshape(flat.shape)
        elif kept is not None and kept.numel() == flat.numel():
            known = kept.reshape(flat.shape)
        with torch.set_grad_enabled(wants_grad):
            scores = self._in_batch(token_scores(self, rows, flat, known), shape)
        if not wants_grad:
            self.know(value, scores)
        return scores

    def read(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`token_log_prob`, without gradient, and from the same pass what the network knew before each token: its last
        hidden states (*batch, max_new_tokens, width), zeros from where every completion has ended.

        A network whose head cannot be told from its body has logits for hidden states.
        """
        rows, flat, shape = self._flat(value)
        with torch.no_grad():
            scores, hidden = (self._in_batch(x, shape) for x in scores_and_hidden(self, rows, flat))
        self.know(value, scores)
        return scores, hidden

    # -- the support -----------------------------------------------------------------------------------------

    @property
    def support_size(self) -> int:
        """How many completions there are: sum over ends t of (V-E)^(t-1) E, plus (V-E)^T that never end."""
        vocab, ends = self.lm.vocab_size, len(self.lm.eos_token_ids)
        alive = vocab - ends
        return sum(alive ** (t - 1) * ends for t in range(1, self.max_new_tokens + 1)) + alive**self.max_new_tokens

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every completion, shape (support_size, *batch_shape, max_new_tokens) (batch dims 1 if not expanded).

        :raises ValueError: if there are more than `max_support` completions.
        """
        if self.support_size > self.max_support:
            raise ValueError(
                f"{self.support_size:,} completions are too many to enumerate (limit {self.max_support:,}): "
                "use a smaller vocabulary or max_new_tokens, or another engine"
            )
        device = self.lm.device
        tokens = torch.arange(self.lm.vocab_size, device=device)
        is_end = self.is_eos(tokens)
        alive = torch.empty((1, 0), dtype=torch.long, device=device)
        done = []
        for t in range(self.max_new_tokens):
            longer = torch.cat([alive.repeat_interleave(len(tokens), 0), tokens.repeat(len(alive))[:, None]], dim=-1)
            ended = is_end.repeat(len(alive))
            padding = (0, self.max_new_tokens - t - 1)
            done.append(torch.nn.functional.pad(longer[ended], padding, value=self.lm.pad_token_id))
            alive = longer[~ended]
        values = torch.cat([*done, alive])
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + self.event_shape)
        return values.expand((-1, *self.batch_shape, -1)) if expand else values

    def arbitrary(self) -> Tensor:
        """A well-formed batch of completions without a forward pass, to see what a program does with one."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch_shape + self.event_shape
        value = torch.randint(self.lm.vocab_size, shape, generator=generator).to(self.lm.device)
        return value.masked_fill(~self.is_live(value), self.lm.pad_token_id)

    @property
    def max_rows(self) -> int:
        """How many completions one forward pass of bounded memory takes."""
        return self.lm.batch_size or self.lm.causal.rows_per_batch(self._length)

    @property
    def max_rows_with_gradient(self) -> int:
        """How many completions one micro-batch of a gradient takes."""
        fit = self.lm.causal.rows_per_micro_batch(self._length)
        return self.lm.micro_batch_size or min(self.lm.batch_size or fit, fit)

    @property
    def flat_prompts(self) -> tuple[Tensor, Tensor | None]:
        """The prompts' ids and mask, (prompts, length)."""
        ids = self.prompt_ids.reshape(-1, self.prompt_ids.shape[-1])
        return ids, None if self.prompt_mask is None else self.prompt_mask.reshape(ids.shape)

    def is_eos(self, value: Tensor) -> Tensor:
        """Which tokens end a completion."""
        found = torch.zeros_like(value, dtype=torch.bool)
        for token in self.lm.eos_token_ids:  # compared with numbers: nothing is sent to the device a token
            found |= value == token
        return found

    def lengths(self, value: Tensor) -> Tensor:
        """Tokens of each completion before its padding, the EOS counted; shape of the batch."""
        return self.is_live(value).sum(-1)

    def decode(self, value: Tensor) -> np.ndarray:
        """The texts of completions, an object array of the batch's shape."""
        return self.lm.decode(value)

    def prompt_texts(self) -> list[str]:
        """What the prompts say, one text a prompt (their ids, where there is no tokenizer to read them)."""
        ids, mask = self.flat_prompts
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        if self.lm.tokenizer is None:
            return [" ".join(map(str, row)) for row in rows]
        return list(self.lm.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def know(self, value: Tensor, scores: Tensor) -> None:
        """Note the token log-probabilities (*batch, max_new_tokens) of a value: `token_log_prob` then gives them."""
        self._scored = None if value.is_inference() else (value, self._versions(value), scores)

    def steps(self) -> Steps:
        """Completions of every element of the batch, to be written token by token (particle methods do)."""
        ids, mask = self.flat_prompts
        with torch.no_grad():
            return Steps(self, prefill(self.lm.causal, ids, mask).fork(self._rows(self.batch_shape)))

    def is_live(self, value: Tensor) -> Tensor:
        """True up to and including the first EOS."""
        ends = self.is_eos(value).long()
        return (ends.cumsum(-1) - ends) == 0

    def prefixes(self, rows: Tensor) -> Iterator[tuple[Tensor, Prefix]]:
        """Micro-batches of bounded memory: (indices into rows, their prompts' prefix)."""
        size = self.max_rows
        for prefix, members, prompts in self.blocks(rows, size):
            for part, of in zip(members.split(size), prompts.split(size), strict=True):
                yield part, prefix.fork(of)

    def blocks(self, rows: Tensor, size: int) -> Iterator[tuple[Prefix, Tensor, Tensor]]:
        """Blocks of ``size`` prompts: their prefix, indices into the rows that continue them, and their prompts' rows
        in the prefix. Each prompt is prefilled once, however many completions continue it.
        """
        ids, mask = self.flat_prompts
        for first in range(0, len(ids), size):
            block = slice(first, first + size)
            prefix = prefill(self.lm.causal, ids[block], None if mask is None else mask[block])
            members = ((rows >= first) & (rows < first + size)).nonzero().squeeze(-1)
            yield prefix, members, rows[members] - first

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _length(self) -> int:
        return self.prompt_ids.shape[-1] + self.max_new_tokens

    def _flat(self, value: Tensor) -> tuple[Tensor, Tensor, Size]:
        """Which prompt each completion continues (rows,), the completions (rows, max_new_tokens), and their batch.

        The law depends on the prompt alone, so a value that particles share (an observation) is one row a prompt.
        """
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"expected completions of {self.max_new_tokens} tokens, got shape {tuple(value.shape)}")
        shape = Size(broadcast_shape(value.shape[:-1], self.prompt_ids.shape[:-1]))
        flat = value.expand(shape + self.event_shape).reshape(-1, self.max_new_tokens)
        return self._rows(shape), flat, shape

    def _in_batch(self, x: Tensor, shape: Size) -> Tensor:
        """x (rows, ...) of such a batch, in the law's."""
        x = x.reshape(shape + x.shape[1:])
        return x.expand(broadcast_shape(shape, self.batch_shape) + x.shape[len(shape) :])

    def _versions(self, value: Tensor) -> tuple[int, ...]:
        """Torch's counts of changes in place, of the value and of the weights: a kept score holds while they do."""
        return (value._version, self.lm.causal.version)

    def _known(self, value: Tensor) -> Tensor | None:
        """The token log-probabilities that are kept of a value, if they still hold."""
        if self._scored is None:
            return None
        known, versions, scores = self._scored
        return scores if known is value and versions == self._versions(value) else None

    def _is_well_formed(self, value: Tensor) -> Tensor:
        """Per token: an id in range, or the pad id after the end."""
        in_range = (value >= 0) & (value < self.lm.vocab_size)
        return torch.where(self.is_live(value), in_range, value == self.lm.pad_token_id)

    def _rows(self, shape: Size) -> Tensor:
        """Which prompt each completion of a batch of this shape continues, flat."""
        prompts = self.prompt_ids.shape[:-1]
        return torch.arange(prompts.numel(), device=self.lm.device).reshape(prompts).expand(shape).reshape(-1)


class _WellFormed(constraints.Constraint):
    """Completions of in-range ids that are padded after their first EOS."""

    is_discrete = True
    event_dim = 1

    def __init__(self, law: Autoregressive) -> None:
        self._law = law
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self._law._is_well_formed(value).all(-1)
