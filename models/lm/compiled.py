"""A decode step as one graph that `torch.compile` captures, over keys and values of a fixed size.

Writing a token by a small or a fast network takes the host longer, operation by operation, than the device. A compiled
step is one call, and on CUDA one launch of a recorded graph. For that every step must be the same: keys and values have
room for all tokens from the beginning (`FixedLayer`); the place of the next one is a number on the device; tokens that
are not written are masked. Prompts are read without the graph, and copied into that room; resampled rows are gathered
inside it.

The numbers of rows and of tokens are symbols of the graph: it is compiled once for each structure of a network (a
prior, policies with adapters of one rank, ...), and serves all its batches. Weights are inputs of the graph, and so
those of a policy in training are current. CUDA records a graph for each size, so there rows and tokens are padded to
few sizes. Steps have no gradient; texts are scored, with or without one, by passes that are not compiled.
"""

from __future__ import annotations

import copy
import itertools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from . import memory, own_forward
from .masks import attention_mask
from .network import CausalNetwork
from .prefix import Prefix, extend, positions_after, prefill
from .remembered import remembered
from .usage import count_pass

BACKEND = "inductor"

_numbers = itertools.count()


class CompiledStep:
    """The compiled decode steps of a language model and of its policies, by the structure of their networks."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, Callable[..., Tensor]] = {}
        self._worked: set[Hashable] = set()

    def __call__(self, module: nn.Module, structure: Hashable, *state: Any) -> Tensor:
        """Compute `_step` of a module, which takes the ``state`` after it.

        :param structure: of the module, see `structure_of`.
        :raises RuntimeError: if the step cannot be compiled, with the reason.
        """
        if structure in self._worked:
            return self._steps[structure](module, *state)
        try:
            if structure not in self._steps:
                self._steps[structure] = _compiled(state[0].device)
            out = self._steps[structure](module, *state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever type: a compiler's
            raise RuntimeError(_why(type(module).__name__, error)) from error
        self._worked.add(structure)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        return self


def _compiled(device: torch.device) -> Callable[..., Tensor]:
    """Return `_step`, to be compiled for networks of one structure.

    Torch keeps what it has compiled with the code of a function, and only so much of each: this has a code of its own.
    """
    code = _step.__code__.replace(co_name=f"decode_step_{next(_numbers)}")
    step = types.FunctionType(code, _step.__globals__, code.co_name)
    mode = "reduce-overhead" if memory.records(device) else None
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend=BACKEND, mode=mode)
    if not memory.records(device):
        return compiled

    def replayed(*state: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = compiled(*state)
        return out.clone()  # the next replay, perhaps of another batch, writes to the same memory

    return replayed


def _step(
    module: nn.Module,
    ids: Tensor,
    positions: Tensor | None,
    written: Tensor,
    at: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    mask_dtype: torch.dtype | None,
    is_body: bool,
) -> Tensor:
    """Return the hidden states (row, width) after one more token of each row.

    :param module: the network's body, or the network where its logits stand for hidden states.
    :param ids: the tokens, (row, 1).
    :param positions: theirs, (row, 1); None where the network counts them.
    :param written: False at padding of prompts, (row, length); tokens that are still to be written count as True.
    :param at: the place of these tokens, a number.
    :param keys: of each layer, (row, head, length, width); they are written to.
    :param values: likewise.
    :param mask_dtype: see `CausalNetwork.mask_dtype`.
    :param is_body: whether the module computes hidden states.
    """
    from .caches import Cache, FixedLayer

    attended = written & (torch.arange(written.shape[-1], device=written.device) <= at)
    mask = attended.long() if mask_dtype is None else attention_mask(attended[:, None, None], mask_dtype)
    cache = Cache(layers=[FixedLayer(k, v, at) for k, v in zip(keys, values, strict=True)])
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if positions is not None:
        inputs["position_ids"] = positions
    out = module(**inputs)
    states: Tensor = out.last_hidden_state if is_body else out.logits
    return states[:, -1]


def structure_of(module: nn.Module) -> Hashable:
    """Return what a module has in common with all that one compiled step serves."""
    return tuple((name, p.shape, p.dtype, p.device.type, p.requires_grad) for name, p in module.named_parameters())


class FixedPrefix:
    """Prompts and what was written after them, as keys and values of a fixed size.

    :param network: the network, which has a ``compiled`` step.
    :param prefix: the prompts after their forward pass, one a row; its keys and values are moved.
    :param new: the number of tokens that can follow.
    """

    def __init__(self, network: CausalNetwork, prefix: Prefix, new: int) -> None:
        rows, device = len(prefix.hidden), prefix.hidden.device
        length = prefix.cache.layers[0].keys.shape[-2]
        size, room = sizes(rows, length + new, memory.records(device))
        self._module = network.decoding_module  # whose weights, if they are converted, are converted once
        self._rows, self._structure = rows, structure_of(self._module)
        self._whole = _moved(prefix, size, room)
        if memory.records(device):
            weakref.finalize(self, setattr, remembered(), "idle", self._whole).atexit = False
        self._written = torch.ones((size, room), dtype=torch.bool, device=device)
        if prefix.mask is not None:
            self._written[:rows, :length] = prefix.mask.bool()
        self._at = torch.full((), length, device=device)
        self._lengths = torch.cat([prefix.lengths, prefix.lengths.new_zeros(size - rows)])
        self._resize(size)

    def _resize(self, size: int) -> None:
        """Use the first so many rows, at the same address."""
        self._kept = [_fixed(x[:size], 0, 2) for x in self._whole]
        self._written = _fixed(self._written[:size], 0, 1)
        self._at = _fixed(self._at)
        self._lengths = self._lengths[:size]

    def extend(
        self, network: CausalNetwork, ids: Tensor, done: int, step: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return hidden states (row, width) after tokens (row,) that follow the prompts and ``done`` earlier tokens.

        :param step: computes them; None: the network's `CompiledStep`.
        """
        from torch._dynamo import mark_dynamic

        count_pass(len(ids))
        tokens = torch.cat([ids, ids.new_zeros(len(self._lengths) - len(ids))])[:, None]
        mark_dynamic(tokens, 0)
        positions = None
        if network.takes_positions:
            steps = torch.arange(done, done + 1, device=ids.device)
            positions = positions_after(network, self._lengths, steps)
            mark_dynamic(positions, 0)
        step = step or network.compiled
        assert step is not None
        state = (tokens, positions, self._written, self._at, self._kept[::2], self._kept[1::2])
        settings = (network.mask_dtype, network.body is not None)
        with torch.no_grad():
            hidden = step(self._module, self._structure, *state, *settings)
        self._at.add_(1)
        return hidden[: self._rows]

    def select(self, rows: Tensor) -> None:
        """Replace row i by row ``rows[i]``; on a CPU a row that stays costs nothing."""
        to: slice | Tensor = slice(len(rows))
        if rows.device.type == "cpu":
            to = (rows != torch.arange(len(rows))).nonzero().squeeze(-1)
            rows = rows[to]
        for x in (*self._kept, self._written, self._lengths):
            x[to] = x[rows]

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedPrefix:
        memo[id(self._module)] = self._module
        new = copy.copy(self)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for x in (*self._kept, self._written, self._lengths):
            x[: len(rows)] = x[rows]
        self._rows = len(rows)
        size, _ = sizes(self._rows, 0, memory.records(rows.device))
        self._resize(min(size, len(self._lengths)))


def sizes(rows: int, length: int, recorded: bool) -> tuple[int, int]:
    """Return how many rows and tokens a step is given for so many."""
    rows = max(2, rows)  # torch makes a graph of its own for a single row
    if recorded:
        rows, length = memory.recorded_rows(rows), memory.recorded_length(length)
    return rows, length + (length == rows)  # and it takes equal sizes for one


def _fixed(x: Tensor, *dims: int) -> Tensor:
    """Mark a tensor as one that steps find at the same address, and some sizes of it as symbols."""
    from torch._dynamo import mark_dynamic, mark_static_address

    for dim in dims:
        mark_dynamic(x, dim)
    mark_static_address(x, guard=False)
    return x


def _moved(prefix: Prefix, size: int, room: int) -> list[Tensor]:
    """Return the keys and values of prompts in tensors of so many rows and tokens, which the prefix then lacks.

    A graph that was recorded for the tensors of an earlier batch of the run need not be recorded again: they are
    taken if they fit.
    """
    kept, moved = remembered(), []
    idle, kept.idle = kept.idle, []
    layers = [(layer, name) for layer in prefix.cache.layers for name in ("keys", "values")]
    for i, (layer, name) in enumerate(layers):
        old: Tensor = getattr(layer, name)
        shape = (size, old.shape[1], room, old.shape[3])
        if i < len(idle) and _is_like(idle[i], shape, old):
            moved.append(idle[i].zero_())  # what is masked counts for nothing, but for NaN
        else:
            idle = []
            moved.append(old.new_zeros(shape))
        moved[-1][: len(old), :, : old.shape[2]] = old
        setattr(layer, name, None)
    return moved


def _is_like(x: Tensor, shape: tuple[int, ...], other: Tensor) -> bool:
    same = x.shape == shape and (x.dtype, x.device) == (other.dtype, other.device)
    return same and x.is_inference() == torch.is_inference_mode_enabled()


# -- which networks ------------------------------------------------------------------------------------------


def refuse_uncompilable(network: CausalNetwork) -> None:
    """Refuse a network whose decode step does not compute what it computes by itself; it is tried uncompiled.

    :raises TypeError: with the reason.
    """
    reason = _unsupported(network)
    if reason is not None:
        raise TypeError(f"compile=True: {network.name} {reason}. Leave out compile=True")


def _unsupported(network: CausalNetwork) -> str | None:
    if network.start_ids:
        return "is an encoder-decoder network, whose decoder attends to two caches, and only causal ones are compiled"
    if network.shards is not None:
        return "is sharded over processes, which gather its weights in the middle of a step"
    if not network.findings.caches:
        return "keeps other states than keys and values, as recurrent networks do, or reads whole texts at every token"
    if not network.shares_prefill(torch.ones(1, 1)):
        return "reads whole texts at every token where they are padded"
    with own_forward.aside(network.device):
        try:
            difference = _difference(network)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever type, where the network wants another cache
            return f"fails with keys and values of a fixed size ({type(error).__name__}: {_first_line(error)})"
    if difference > network.rounding:
        share = f"{difference:.2g} of their range"
        return f"computes other log-probabilities with keys and values of a fixed size (they differ by {share})"
    return None


def _difference(network: CausalNetwork) -> float:
    """Return by how much log-probabilities after fixed keys and values differ, as a share of their range."""
    ids = own_forward.texts(network)
    cut = max(1, ids.shape[-1] // 2)
    mask = torch.ones_like(ids[:, :cut])
    mask[0, : cut - 1] = 0
    grown, start = (prefill(network, ids[:, :cut], mask) for _ in range(2))
    fixed = FixedPrefix(network, start, 2 * ids.shape[-1])
    found, expected = [], []
    for t, tokens in enumerate(ids[:, cut:].T):
        expected.append(network.logits(extend(network, grown, tokens[:, None], done=t)[:, -1], 1.0))
        hidden = fixed.extend(network, tokens, t, lambda module, _, *state: _step(module, *state))
        found.append(network.logits(hidden, 1.0))
    if not found:
        return 0.0
    return own_forward.difference(torch.stack(found).log_softmax(-1), torch.stack(expected).log_softmax(-1))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def _why(name: str, error: BaseException) -> str:
    """Return why a step could not be compiled, and what to do."""
    if any(word in f"{type(error).__name__} {error}" for word in ("InvalidCxxCompiler", "CppCompileError")):
        return (
            "compile=True needs a working C++ compiler, which torch has not found: install g++ or clang++, or name it "
            f"in the environment variable CXX; or leave out compile=True ({_first_line(error)})"
        )
    return (
        f"compile=True: torch.compile makes no graph of a decode step of {name} "
        f"({type(error).__name__}: {_first_line(error)}). Leave out compile=True"
    )
