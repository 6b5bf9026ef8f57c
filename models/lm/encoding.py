"""Token ids: of prompts (texts, chats or token ids) as one left-padded batch, and of completions with their ends."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.characters import check_characters
from bayeslm.chats import is_chat
from bayeslm.validation import Unchecked, show

from .chats import chat_text
from .remembered import key_of, on_host, recalled, remembered
from .stops import Stops
from .tables import refuse_table

Prompt = str | Sequence[dict[str, Any]] | Sequence[int] | Tensor
UNOBSERVED = -100  # in the place of all tokens after an observed beginning of a completion


class Base(NamedTuple):
    """Prompts that others begin with: ``ids`` and ``mask`` (base, length) as of `Encoded`.

    ``rows`` (*prompts) is the one that each prompt begins with.
    """

    ids: Tensor
    mask: Tensor | None
    rows: Tensor


class Encoded(NamedTuple):
    """``ids`` (*prompts, length), left-padded; ``mask`` of the same shape, None where nothing is padded.

    ``chats`` (*prompts) is an object array of the messages of each prompt, None where it is no chat; ``base`` what
    prompts were joined to, if they were.
    """

    ids: Tensor
    mask: Tensor | None
    chats: np.ndarray | None = None
    base: Base | None = None

    def rows(self) -> list[list[int]]:
        """Return the token ids of each prompt, without padding."""
        ids = self.ids.reshape(-1, self.ids.shape[-1]).tolist()
        if self.mask is None:
            return list(ids)
        counts = self.mask.reshape(-1, self.mask.shape[-1]).sum(-1).tolist()
        return [row[len(row) - count :] for row, count in zip(ids, counts, strict=True)]


Prompts = Annotated[Sequence[Prompt] | np.ndarray | Tensor | Encoded, Unchecked]  # by `encode`


def encode(
    prompts: Prompts,
    tokenizer: Any,
    *,
    bos_token_id: int | None,
    vocab_size: int,
    room: int | None,
    device: torch.device,
    complete: bool = False,
) -> Encoded:
    """Encode a batch of prompts; in a run, those that it has encoded already are remembered (`remembered`).

    :param prompts: a sequence of strings, chats (lists of ``{"role", "content"}``, see `chats`) or token ids; or an
        object array of them, whose shape becomes the batch's. An array or tensor of integers is a row of token ids a
        prompt. Encoded prompts (as of `LanguageModel.join`) are returned, once their length has been checked.
    :param tokenizer: None if prompts are token ids.
    :param bos_token_id: stands for an empty prompt.
    :param vocab_size: number of token ids.
    :param room: the most tokens a prompt may have, None for no limit.
    :param device: where the batch goes.
    :param complete: whether texts are complete, as an encoder reads them, with all that the tokenizer adds; else they
        are continued.
    :raises TypeError: for one prompt or a table instead of a list of prompts, strings without a tokenizer, or malformed
        messages.
    :raises ValueError: for no prompts, an empty prompt without a BOS, a lone surrogate, ids out of range, a prompt over
        ``room``, or a chat that the template refuses.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of prompts, got one string: write [{prompts[:40]!r}]")
    if isinstance(prompts, Encoded):
        check_room(prompts, room)
        return prompts
    if not isinstance(prompts, list | tuple) or isinstance(next(iter(prompts), None), Mapping):
        refuse_table(prompts)
    is_list = hasattr(prompts, "__len__") and getattr(prompts, "ndim", 1) > 0
    if not is_list or isinstance(prompts, bytes | type | Set):
        raise TypeError(f"prompts must be a list of prompts, got {show(prompts)}")
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind in "iu":
        prompts = list(prompts)
    shape = prompts.shape if isinstance(prompts, np.ndarray) else (len(prompts),)
    flat = list(prompts.reshape(-1)) if isinstance(prompts, np.ndarray) else list(prompts)
    if not flat:
        raise ValueError("prompts is empty: give at least one prompt")
    memory = remembered()
    by = (memory.of(tokenizer), repr(getattr(tokenizer, "chat_template", None)), bos_token_id, complete)
    key_by_id = {name: key_of(prompt) for name, prompt in {id(prompt): prompt for prompt in flat}.items()}
    keys = [key_by_id[id(prompt)] for prompt in flat]

    def row(i: int) -> list[int]:
        key = None if keys[i] is None else (*by, keys[i])
        return recalled(memory.rows, key, lambda: _one(i, flat[i], tokenizer, bos_token_id, complete))

    def batch() -> Encoded:
        places: dict[Hashable, int] = {}
        firsts = [places.setdefault(i if key is None else key, i) for i, key in enumerate(keys)]
        rows = {i: row(i) for i in places.values()}
        found = _padded(rows, firsts, shape, vocab_size, room, device)
        if not any(is_chat(flat[i]) for i in rows):
            return found
        chats = np.empty(len(flat), dtype=object)
        chats[:] = [tuple(prompt) if is_chat(prompt) else None for prompt in flat]
        return found._replace(chats=chats.reshape(shape))

    of_all = None if None in keys else (*by, vocab_size, room, device, tuple(shape), tuple(keys))
    return recalled(memory.batches, of_all, batch)


def _padded(
    rows: dict[int, list[int]],
    firsts: list[int],
    shape: tuple[int, ...],
    vocab_size: int,
    room: int | None,
    device: torch.device,
) -> Encoded:
    """Return rows of token ids as a left-padded batch of prompts; see `encode`.

    :param rows: token ids of prompts that differ, by the index of the first of those that are equal.
    :param firsts: that index, for each prompt.
    """
    for i, row in rows.items():
        if min(row) < 0 or max(row) >= vocab_size:
            raise ValueError(f"prompts[{i}] holds token ids outside 0..{vocab_size - 1}")
        _check_length(i, len(row), room)
    longest = max(map(len, rows.values()))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows.values()])  # masked: any id in range will do
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows.values()])
    place = {i: j for j, i in enumerate(rows)}
    each = torch.tensor([place[i] for i in firsts])
    padded = any(len(row) < longest for row in rows.values())
    return Encoded(
        ids[each].reshape(*shape, longest).to(device),
        mask[each].reshape(*shape, longest).to(device) if padded else None,
    )


def broadcast_where(prompts: Encoded, where: Tensor, vocabulary: Vocabulary) -> tuple[Encoded, Tensor]:
    """Return prompts, and where completions are written, in the batch that both broadcast to.

    :raises TypeError: if ``where`` is not bool.
    :raises ValueError: if they do not broadcast, or no token ends a completion.
    """
    if where.dtype != torch.bool:
        raise TypeError(f"where must be a bool tensor, got {where.dtype}: write x > 0, or where.bool()")
    if not vocabulary.eos_token_ids:
        raise ValueError("where needs an end token, for the text that ends at once, and this LanguageModel has none")
    ids, mask, base = prompts.ids, prompts.mask, prompts.base
    try:
        shape = torch.broadcast_shapes(ids.shape[:-1], where.shape)
    except RuntimeError:
        raise ValueError(f"where has shape {tuple(where.shape)}, and prompts {tuple(ids.shape[:-1])}") from None
    mask = None if mask is None else mask.expand(*shape, -1)
    base = None if base is None else base._replace(rows=base.rows.expand(shape))
    return Encoded(ids.expand(*shape, -1), mask, base=base), where.to(ids.device).expand(shape)


def check_room(prompts: Encoded, room: int | None) -> None:
    """Check that encoded prompts have at most ``room`` tokens; None for no limit.

    :raises ValueError: if one has more.
    """
    ids, mask = prompts.ids, prompts.mask
    lengths = torch.full(ids.shape[:-1], ids.shape[-1]) if mask is None else mask.sum(-1)
    i = int(lengths.argmax())
    _check_length(i, int(lengths.reshape(-1)[i]), room)


def _check_length(i: int, length: int, room: int | None) -> None:
    if room is not None and length > room:
        raise ValueError(
            f"prompts[{i}] has {length} tokens, and the model's context has room for {max(room, 0)} "
            "before max_new_tokens: shorten the prompt or max_new_tokens"
        )


def _one(i: int, prompt: Prompt, tokenizer: Any, bos_token_id: int | None, complete: bool) -> list[int]:
    """Return the token ids of one prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TypeError(f"prompts[{i}] is a string, and this LanguageModel has no tokenizer: give token ids")
        check_characters(f"prompts[{i}]", prompt)
        row = list(tokenizer(prompt)["input_ids"]) if complete else _text_ids(prompt, tokenizer)
    elif is_chat(prompt):
        messages: Any = prompt
        chat = chat_text(f"prompts[{i}]", messages, tokenizer)
        check_characters(f"prompts[{i}]", chat)
        row = list(tokenizer(chat, add_special_tokens=False)["input_ids"])
    else:
        try:
            ids: Any = list(prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt)
            if isinstance(prompt, bytes | bytearray | Set) or any(isinstance(token, bool) for token in ids):
                raise TypeError("bytes, sets and flags are no token ids")
            row = [operator.index(token) for token in ids]
        except TypeError as error:
            raise TypeError(
                f"prompts[{i}] is {prompt!r:.60}: a prompt is a string, a chat (a list of messages) or a sequence of "
                "token ids, and a single one goes into a list: [prompt]"
            ) from error
    if row:
        return row
    if bos_token_id is None:
        raise ValueError(f"prompts[{i}] is empty, and the model has no BOS token to start from")
    return [bos_token_id]


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text that is to be continued: without what the tokenizer appends to complete texts.

    What it puts before a text stays, and so does an end that the text itself holds.
    """
    row, added = _with_added(text, tokenizer)
    if 0 in added:
        return row[: len(row) - added[::-1].index(0)]
    _, around = _with_added("a", tokenizer)  # an empty text does not show what comes before it, and what after
    return row[: around.index(0)] if 0 in around else []


def _with_added(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids of a text, and 1 at those that the tokenizer has added."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    return list(encoded["input_ids"]), list(encoded["special_tokens_mask"])


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions (row, length) of left-padded ids (row, length)."""
    if mask is None:
        return torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(-1) - 1).clamp_min(0)  # no token attends to padding, whose own position does not matter


@dataclass(frozen=True)
class Vocabulary:
    """The token ids 0, ..., size - 1 of a network, and how a completion of T of them ends.

    :param size: number of tokens.
    :param eos_token_ids: the first of these in a completion ends it, and counts.
    :param pad_token_id: fills a completion after its end; it need not be a token of the network.
    :param stops: the strings that end a completion as well, if there are any.
    """

    size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stops: Stops | None = None

    def stopping_at(self, stops: Stops | None) -> Vocabulary:
        """Return the same tokens with stop strings.

        Where the pad is a word of its own, an end token fills completions: then they can be read without these strings.
        """
        if stops is None:
            return self
        pad = self.pad_token_id
        if pad not in self.eos_token_ids and 0 <= pad < self.size:
            pad = next(iter(self.eos_token_ids), UNOBSERVED)
        return replace(self, pad_token_id=pad, stops=stops)

    def is_eos(self, ids: Tensor) -> Tensor:
        """Return which tokens end a completion, bool of the same shape."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.eos_token_ids:  # compared with Python numbers, which need no transfer to the device
            found |= ids == token
        return found

    def is_end(self, values: Tensor) -> Tensor:
        """Return which tokens of completions (..., T) end them, bool of the same shape; it counts the first alone."""
        found = self.is_eos(values)
        if self.stops is not None:
            found |= self.stops.to(values.device).states(values) == self.stops.ended
        return found

    def is_live(self, values: Tensor) -> Tensor:
        """Return True up to and including the first EOS of completions (..., T), False on their padding.

        Of the observed beginning of a completion it is True at the tokens that are observed.
        """
        ends = self.is_end(values).long()
        return ((ends.cumsum(-1) - ends) == 0) & ((values == UNOBSERVED).cumsum(-1) == 0)

    def before_end(self, values: Tensor) -> list[list[int]]:
        """Return the token ids of each of completions (..., T) before its end, without negative ones."""
        ends = set(self.eos_token_ids)
        rows = on_host(values).reshape(-1, values.shape[-1]).tolist()
        written = (itertools.takewhile(lambda token: token not in ends, row) for row in rows)
        return [[token for token in row if token >= 0] for row in written]

    def with_end(self, values: Tensor) -> list[list[int]]:
        """Return the token ids of each of completions (..., T) up to its end, with that."""
        values = on_host(values)
        lengths = self.is_live(values).sum(-1).reshape(-1).tolist()
        rows = values.reshape(-1, values.shape[-1]).tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def is_well_formed(self, values: Tensor) -> Tensor:
        """Return, for each token of completions (..., T), whether it is in range, or the pad id after the end.

        The beginning of a completion goes on with `UNOBSERVED`.
        """
        in_range = (values >= 0) & (values < self.size)
        ends = self.is_end(values).long()
        padded = (values == self.pad_token_id) & ((ends.cumsum(-1) - ends) > 0)
        return torch.where(self.is_live(values), in_range, padded | (values == UNOBSERVED))

    def num_completions(self, length: int) -> int:
        """Return how many completions of at most ``length`` tokens exist.

        With E of V tokens ending one: the sum over t of (V-E)^(t-1) E that end at t, plus (V-E)^T that never end.
        Where strings end one too, E depends on the state of the text so far.
        """
        if self.stops is not None:
            return self._num_stopping(length)
        ends = len(self.eos_token_ids)
        alive = self.size - ends
        return sum(alive ** (t - 1) * ends for t in range(1, length + 1)) + alive**length

    def _num_stopping(self, length: int) -> int:
        assert self.stops is not None
        ended = self.stops.ended
        lives = ~self.is_eos(torch.arange(self.size))
        steps = [row[lives].bincount(minlength=ended + 1).tolist() for row in self.stops.table[:ended].cpu()]
        alive, done = [1, *[0] * (ended - 1)], 0
        for _ in range(length):
            done += sum(alive) * len(self.eos_token_ids) + sum(
                n * row[ended] for n, row in zip(alive, steps, strict=True)
            )
            alive = [sum(n * row[state] for n, row in zip(alive, steps, strict=True)) for state in range(ended)]
        return done + sum(alive)

    def completions(self, length: int, device: torch.device) -> Tensor:
        """Enumerate all completions of at most ``length`` tokens, (completion, length)."""
        tokens = torch.arange(self.size, device=device)
        alive = torch.empty((1, 0), dtype=torch.long, device=device)
        done = []
        for t in range(length):
            longer = torch.cat([alive.repeat_interleave(len(tokens), 0), tokens.repeat(len(alive))[:, None]], dim=-1)
            ended = self.is_end(longer)[:, -1]
            done.append(pad(longer[ended], (0, length - t - 1), value=self.pad_token_id))
            alive = longer[~ended]
        return torch.cat([*done, alive])
