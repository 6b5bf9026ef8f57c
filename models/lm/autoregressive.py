r"""The distribution of a completion given its prompt.

    p(x | c) = \prod_{t=1}^{\tau} p(x_t | c, x_{<t}),     \tau = min(first t with x_t = EOS, max_new_tokens)

A completion ends at its first EOS token, which counts, or at ``max_new_tokens``; after that it is padded, and padding
carries no probability. So the distribution is normalised over completions: every sequence that has not ended by the
limit is a completion of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape  # torch's takes ten times as long
from torch import Size, Tensor
from torch.distributions import constraints

from bayeslm.validation import Count, Positive, Unchecked, show, validated

from .decoding import Decoder, generate, only_end
from .encoding import Base, Encoded, Vocabulary
from .prefix import PromptedNetwork
from .sampler import Densities, draw_scored
from .scopes import exclusive, samplers_allowed
from .scoring import scores_and_hidden, token_scores
from .stops import Stops
from .token_model import TokenModel
from .truncation import Truncation


@validated
class Autoregressive(TorchDistribution):
    """Completions of a batch of prompts.

    ``batch_shape`` is the prompts', or more after `expand`; ``event_shape`` is ``(max_new_tokens,)``; values are
    ``int64`` token ids.

    :param lm: the language model, or an object with the attributes of one that are used.
    :param prompt_ids: left-padded token ids, shape (*prompts, length).
    :param prompt_mask: 1 at tokens that are not padding, same shape; None if no prompt is padded.
    :param max_new_tokens: the longest completion.
    :param temperature: divides the logits; the distribution is that of the tempered network.
    :param truncation: what remains of the distribution of each token; None: all.
    :param truncated_by: the language model by whose probabilities tokens remain, as a policy's prior; None: ``lm``.
    :param stops: the strings that end a completion as an end token does.
    :param where: bool (*prompts): elsewhere the completion is the text that ends at once, with probability 1, by every
        language model. None: everywhere.
    :param base: what the prompts begin with; it goes through the network once for all that begin with it.
    :raises ValueError: if ``max_new_tokens`` < 1 or ``temperature`` is not positive and finite.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False
    has_enumerate_support = True
    max_support = 2**22  # completions that `enumerate_support` lists at most

    def __init__(
        self,
        lm: Annotated[TokenModel, Unchecked],
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        max_new_tokens: Count,
        temperature: Positive = 1.0,
        *,
        truncation: Truncation | None = None,
        truncated_by: Annotated[TokenModel | None, Unchecked] = None,
        stops: Stops | None = None,
        where: Tensor | None = None,
        base: Base | None = None,
    ) -> None:
        self.lm = lm
        self.prompt_ids = prompt_ids
        self.prompt_mask = prompt_mask
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.truncation = truncation
        self.truncated_by = truncated_by
        self.stops = stops
        self.where = where
        self.base = base
        # Of the last sample of this distribution, or of a larger batch of it: values, versions, token scores.
        self._drawn: list[tuple[Tensor, tuple[Any, ...], Tensor]] = []
        self._densities: list[Densities] = []  # of what a sampler has drawn
        super().__init__(prompt_ids.shape[:-1], Size([max_new_tokens]), validate_args=False)

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids of completions."""
        return self.lm.vocabulary.stopping_at(self.stops)

    @property
    def prompted(self) -> PromptedNetwork:
        """The network and its prompts.

        :raises TypeError: for a policy in the place of a truncated prior, if one of both is sharded.
        """
        other = None
        if self.truncated_by is not None:
            other = replace(self.with_model(self.truncated_by).prompted, truncation=None)
            if self.lm.causal.shards is not None or other.network.shards is not None:
                raise TypeError(
                    "a policy in the place of a truncated prior (top_k, top_p) reads every text by two networks, and "
                    "one of them is sharded by fully_shard: leave out top_k and top_p, or load the networks whole"
                )
        return PromptedNetwork(
            self.lm.current(),
            self.vocabulary,
            *self.flat_prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            truncation=self.truncation,
            truncating=other,
            taken=None if self.where is None else self.where.reshape(-1),
            base=None if self.base is None else self.base._replace(rows=self.base.rows.reshape(-1)),
            batch_size=self.lm.batch_size,
            micro_batch_size=self.lm.micro_batch_size,
            gradient_checkpointing=self.lm.gradient_checkpointing,
        )

    # -- the distribution ------------------------------------------------------------------------------------

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """Return the same distribution over a larger batch, for which each prompt is still prefilled once."""
        new = self._copy(self.lm, ())
        new._drawn, new._densities = self._drawn, self._densities
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def with_model(self, lm: TokenModel) -> Autoregressive:
        """Return the completions of the same prompts by another language model, as of a policy in the prior's place.

        Where this distribution is truncated it has, of each token, what remains of this one: it draws nothing that this
        one cannot, and all that it can.

        :raises ValueError: if the models' vocabularies differ: in size, EOS or pad token.
        """
        if lm is not self.lm and lm.vocabulary != self.lm.vocabulary:
            raise ValueError(
                f"the language models' vocabularies differ, {self.lm.vocabulary} and {lm.vocabulary}: "
                "one cannot propose completions of the other"
            )
        return self._copy(lm, ())

    def first(self, size: int) -> Autoregressive:
        """Return the distribution of the first ``size`` elements of the batch's first axis."""
        return self.narrowed(-len(self.batch_shape), 0, size)

    def narrowed(self, dim: int, first: int, size: int) -> Autoregressive:
        """Return the distribution of ``size`` elements of one batch dimension, from ``first``.

        :param dim: the batch dimension, negative.
        """
        axis = self.prompt_ids.dim() - 1 + dim
        own = axis >= 0 and self.prompt_ids.shape[axis] > 1
        some = (slice(None),) * axis + (slice(first, first + size),) if own else ()
        shape = list(self.batch_shape)
        shape[dim] = size
        return self._copy(self.lm, some).expand(shape)

    def _copy(self, lm: TokenModel, some: tuple[slice, ...]) -> Autoregressive:
        """Return the distribution of some prompts, by an index of their axes, by a language model."""
        own = self.truncated_by or self.lm
        new = Autoregressive(
            lm,
            self.prompt_ids[some],
            None if self.prompt_mask is None else self.prompt_mask[some],
            self.max_new_tokens,
            self.temperature,
            truncation=self.truncation,
            truncated_by=None if self.truncation is None or own is lm else own,
            stops=self.stops,
            where=None if self.where is None else self.where[some],
            base=None if self.base is None else self.base._replace(rows=self.base.rows[some]),
        )
        if not some:
            TorchDistribution.__init__(new, self.batch_shape, self.event_shape, validate_args=False)
        return new

    def is_same(self, other: Autoregressive) -> bool:
        """Return whether this is the same distribution: one network, the same settings and prompts."""
        alike = self.lm is other.lm and self.temperature == other.temperature and self.truncation == other.truncation
        alike &= self.truncated_by is other.truncated_by
        tensors = zip((self.prompt_mask, self.where), (other.prompt_mask, other.where), strict=True)
        return (
            alike
            and self.stops == other.stops
            and torch.equal(self.prompt_ids, other.prompt_ids)
            and all(a is b if a is None or b is None else torch.equal(a, b) for a, b in tensors)
        )

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _WellFormed(self.vocabulary)

    def sample(self, sample_shape: Any = Size(), *, watch: Callable[[Tensor], None] | None = None) -> Tensor:
        """Draw completions, shape (*sample_shape, *batch_shape, max_new_tokens). Their scores are kept.

        :param watch: called with the first completion (max_new_tokens,) after each of its tokens, padded.
        """
        shape = Size(sample_shape) + self.batch_shape
        rows, log_s, stale = self.prompt_rows(shape), None, False
        with exclusive(), torch.no_grad():
            if self.is_sampled:
                assert self.lm.sampler is not None
                value, scores, log_s, stale = draw_scored(self.lm.sampler, self.lm.weights, self.prompted, rows)
            else:
                value = rows.new_full((len(rows), self.max_new_tokens), self.vocabulary.pad_token_id)
                scores = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
                with self.prompted.drawing(len(rows)) as prompted:
                    for part, prefix in prompted.prefixes(rows, prompted.max_rows):
                        watched = None if watch is None or part[0] != 0 else watch
                        value[part], scores[part] = generate(Decoder(prompted, prefix), watched)
        value = value.reshape(shape + self.event_shape)
        kept = (value, self._versions(value), scores.reshape(value.shape))
        self._drawn[:] = [] if value.is_inference() else [kept]
        if log_s is not None:
            self._densities[:] = self._densities or [Densities()]
            self._densities[0].keep(value, log_s.reshape(value.shape), stale)
            if watch is not None:
                watch(value.reshape(-1, self.max_new_tokens)[0])
        return value

    @property
    def is_sampled(self) -> bool:
        """Whether the language model's sampler draws, here and now."""
        return getattr(self.lm, "sampler", None) is not None and samplers_allowed()

    def proposal_token_log_prob(self, value: Tensor) -> Tensor | None:
        """Return log s of each token of a value that a sampler drew, (*batch, max_new_tokens); None where none draws.

        :raises LookupError: if a sampler has drawn for this distribution, and this is none of its values.
        """
        return self._densities[0].of(value) if self._densities else None

    def is_stale(self, value: Tensor) -> bool:
        """Return whether a sampler has drawn a value by other weights than it was asked for."""
        return bool(self._densities) and self._densities[0].are_stale(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(value | prompt), shape of the batch; -inf for a malformed completion."""
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
        known = self._score_of_drawn(value) if known is None else known
        if known is not None and not wants_grad:
            return known.expand(broadcast_shape(known.shape[:-1], self.batch_shape) + self.event_shape)
        rows, flat, shape = self._flat(value)
        if known is not None:
            known = known.expand(shape + self.event_shape).reshape(flat.shape)
        with torch.set_grad_enabled(wants_grad):
            return self._in_batch(token_scores(self.prompted, rows, flat, known), shape)

    def token_log_prob_and_hidden(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return `token_log_prob`, without gradient, and, of the same pass, the last hidden states before each token.

        Hidden states are (*batch, max_new_tokens, width), 0 where every completion has ended. A network whose head
        cannot be separated from its body has logits for hidden states.
        """
        rows, flat, shape = self._flat(value)
        with torch.no_grad():
            scores, hidden = scores_and_hidden(self.prompted, rows, flat)
        return self._in_batch(scores, shape), self._in_batch(hidden, shape)

    def next_token_log_prob(self, value: Tensor) -> Tensor:
        """Return log p(. | prompt, x_<t) before each token of a completion, (*batch, max_new_tokens, vocabulary).

        Without gradient; of no meaning where the completion has ended.
        """
        _, hidden = self.token_log_prob_and_hidden(value)
        logits = self.lm.causal.logits(hidden, self.temperature)
        if self.truncation is not None:
            of = None
            if self.truncated_by is not None:
                _, hidden = self.with_model(self.truncated_by).token_log_prob_and_hidden(value)
                of = self.truncated_by.causal.logits(hidden, self.temperature)
            logits = self.truncation(logits, of)
        if self.where is not None:
            first = only_end(logits[..., 0, :], self.where.expand(logits.shape[:-2]), self.vocabulary)
            logits = torch.cat([first[..., None, :], logits[..., 1:, :]], -2)
        return logits.log_softmax(-1)

    # -- the support -----------------------------------------------------------------------------------------

    @property
    def support_size(self) -> int:
        """How many completions exist."""
        return self.vocabulary.num_completions(self.max_new_tokens)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return every completion, shape (support_size, *batch_shape, max_new_tokens) (batch dims 1 if not expanded).

        :raises ValueError: if there are more than `max_support` completions.
        """
        if self.support_size > self.max_support:
            raise ValueError(
                f"{self.support_size:,} completions are too many to enumerate (limit {self.max_support:,}): "
                "use a smaller vocabulary or max_new_tokens, or another engine"
            )
        values = self.vocabulary.completions(self.max_new_tokens, self.prompt_ids.device)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + self.event_shape)
        return values.expand((-1, *self.batch_shape, -1)) if expand else values

    def arbitrary(self, seed: int = 0) -> Tensor:
        """Return well-formed completions, (*batch_shape, max_new_tokens), without a forward pass, to try a program.

        :param seed: above 0, completions have different lengths, and low token ids, which are those of frequent tokens
            in most vocabularies, are frequent in them.
        """
        generator = torch.Generator().manual_seed(seed)
        size, shape = self.vocabulary.size, self.batch_shape + self.event_shape
        value = torch.randint(size, shape, generator=generator)
        if seed:
            value = ((size + 1) ** torch.rand(shape, generator=generator) - 1).long().clamp(max=size - 1)
            end = torch.randint(self.max_new_tokens + 1, (*self.batch_shape, 1), generator=generator)
            for eos in self.vocabulary.eos_token_ids[:1]:
                value = torch.where(self.vocabulary.is_eos(value), (value + 1) % size, value)
                value = torch.where(torch.arange(self.max_new_tokens) == end, eos, value)
        value = value.to(self.prompt_ids.device)
        if self.where is not None:
            value = torch.where(self.where[..., None], value, self.vocabulary.eos_token_ids[0])
        return value.masked_fill(~self.vocabulary.is_live(value), self.vocabulary.pad_token_id)

    def lengths(self, value: Tensor) -> Tensor:
        """Return the number of tokens of each completion before its padding, the EOS counted; shape of the batch."""
        return self.vocabulary.is_live(value).sum(-1)

    def truncated(self, value: Tensor) -> Tensor:
        """Return which completions were cut at the limit, without an end, bool of the shape of the batch."""
        return (self.vocabulary.is_live(value) & ~self.vocabulary.is_end(value))[..., -1]

    # -- texts -----------------------------------------------------------------------------------------------

    @property
    def has_text(self) -> bool:
        """Whether completions can be decoded to texts."""
        return self.lm.has_text

    def decode(self, value: Tensor) -> np.ndarray:
        """Return the texts that completions (*batch, token) add to their prompts, an array of the batch's shape."""
        return self.lm.decode(value, Encoded(self.prompt_ids, self.prompt_mask))

    def prompt_texts(self) -> list[str]:
        """Return the text of each prompt, or its token ids if token ids have no texts."""
        rows = Encoded(self.prompt_ids, self.prompt_mask).rows()
        return self.lm.detokenize(rows) if self.has_text else [" ".join(map(str, row)) for row in rows]

    # -- rows, for engines -----------------------------------------------------------------------------------

    @property
    def flat_prompts(self) -> tuple[Tensor, Tensor | None]:
        """The prompts' ids and mask, (prompt, length)."""
        ids = self.prompt_ids.reshape(-1, self.prompt_ids.shape[-1])
        return ids, None if self.prompt_mask is None else self.prompt_mask.reshape(ids.shape)

    def prompt_rows(self, shape: Size) -> Tensor:
        """Return which of the `flat_prompts` each completion of a batch of this shape continues, flat."""
        prompts = self.prompt_ids.shape[:-1]
        rows = torch.arange(prompts.numel(), device=self.prompt_ids.device)
        return rows.reshape(prompts).expand(shape).reshape(-1)

    @property
    def max_rows(self) -> int:
        """How many completions are drawn at once, in bounded memory."""
        return self.prompted.max_rows

    @property
    def max_rows_with_gradient(self) -> int:
        """How many completions one micro-batch of a gradient takes."""
        return self.prompted.max_rows_with_gradient

    def decoder(self, every: int = 1) -> Decoder:
        """Return unfinished completions, to be written token by token.

        :param every: of so many elements of the batch's first axis, one has a completion.
        """
        prompted = self.prompted
        rows = self.prompt_rows(self.batch_shape).reshape(self.batch_shape)
        return Decoder(prompted, prompted.prefix((rows[::every] if every > 1 else rows).reshape(-1)))

    # -- inside ----------------------------------------------------------------------------------------------

    def _flat(self, value: Tensor) -> tuple[Tensor, Tensor, Size]:
        """Return the prompt that each completion continues (row,), completions (row, max_new_tokens), and their batch.

        The distribution depends on the prompt alone, so a value that particles share (an observation) is one row a
        prompt.
        """
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            raise TypeError(f"value must be a tensor of token ids, whole numbers, got {show(value)}")
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"expected completions of {self.max_new_tokens} tokens, got shape {tuple(value.shape)}")
        shape = Size(broadcast_shape(value.shape[:-1], self.prompt_ids.shape[:-1]))
        flat = value.expand(shape + self.event_shape).reshape(-1, self.max_new_tokens)
        return self.prompt_rows(shape), flat, shape

    def _in_batch(self, x: Tensor, shape: Size) -> Tensor:
        """Return x (row, ...) of a batch of this shape in the batch of the distribution."""
        x = x.reshape(shape + x.shape[1:])
        return x.expand(broadcast_shape(shape, self.batch_shape) + x.shape[len(shape) :])

    def _versions(self, value: Tensor) -> tuple[Any, ...]:
        """Return the versions of a value and of the weights for which a kept score is valid."""
        by = self.truncated_by
        return (value._version, self.lm.causal.version, None if by is None else by.causal.version)

    def _score_of_drawn(self, value: Tensor) -> Tensor | None:
        """Return the token log-probabilities of the last sample, if ``value`` is that and they are still valid."""
        if not self._drawn:
            return None
        [(drawn, versions, scores)] = self._drawn
        return scores if drawn is value and versions == self._versions(value) else None


class _WellFormed(constraints.Constraint):
    """Completions of in-range ids that are padded after their first EOS."""

    is_discrete = True
    event_dim = 1

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self._vocabulary.is_well_formed(value).all(-1)
