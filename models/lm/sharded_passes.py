"""Passes of networks that are sharded by ``fully_shard`` (FSDP2).

Hooks of FSDP gather the weights of a layer before it is computed, and free them after. So the body and the head are
computed inside the hooks of the modules around them (`Shards.inside`), which FSDP's own entry, the network's forward
pass, would run. Gradients reach the parts in a backward pass alone: `torch.autograd.grad` has none of sharded weights.
FSDP divides them by the number of processes; they are multiplied by it, as here each process differentiates its own
rows of one sum.

All processes do the passes together (`lockstep`). Every pass begins and ends with sharded weights, and leaves nothing
behind that FSDP would do in the next one, such as gather ahead what was the layer before: that would be something else
on every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .lockstep import GRADIENT, HEAD, TENSOR, Lockstep, Wanted, announced
from .module_copies import with_forward
from .sharding import count, fsdp_state, gather, is_sharded, number_of, states_of, take_in
from .usage import counting

T = TypeVar("T")


class ComputesPasses(Protocol):
    """What is needed of a network to take part in passes of other processes: `CausalNetwork` is one."""

    @property
    def device(self) -> torch.device: ...
    def hidden_of_texts(self, ids: Tensor, mask: Tensor | None) -> Tensor: ...
    def logits(self, hidden: Tensor, temperature: float) -> Tensor: ...


class Shards:
    """The passes of one sharded network.

    :param network: that was handed in, adapters included.
    :param body: its part that computes hidden states, if it has one.
    :param owner: computes its passes.
    """

    def __init__(self, network: nn.Module, body: nn.Module | None, owner: ComputesPasses) -> None:
        self._network, self._owner = network, owner
        self._number = number_of(network)
        states = states_of(network)
        self._states = [state for _, state in states]
        inner = set() if body is None else set(body.modules()) - {body}
        self._around = [module for module, _ in states if module not in inner]  # body and head, from outside in
        self._layers = [(module, state) for module, state in states if module in inner or body is None]
        self._is_pass = self._is_inside = False

    def opens(self, module: nn.Module | None) -> bool:
        """Return whether a module's own hooks are those that `inside` runs."""
        return any(module is each for each in self._around)

    def without_body(self) -> None:
        """Do all passes by the whole network, whose own forward pass runs all hooks."""
        self._around = []

    def together(self, kind: int, work: Callable[[], T]) -> T:
        """Do a pass together with the other processes; inside another one it is a part of that."""
        if self._is_pass:
            return work()
        found: T = announced(Wanted(kind, self._number), partial(self._run, work))
        return found

    def _run(self, work: Callable[[], T]) -> T:
        """Do a pass, after which the weights are sharded again."""
        self._is_pass = True
        try:
            return work()
        finally:
            self._is_pass = False
            for state in self._states:
                if state._is_root:
                    state._modules[0].reset_iter_state()

    def inside(self, work: Callable[[], T]) -> T:
        """Compute something inside the hooks of FSDP of the modules around body and head."""
        if self._is_inside:
            return work()
        self._is_inside = True
        try:
            for module in reversed(self._around):
                work = _hooked(module, work)
            return work()
        finally:
            self._is_inside = False

    def gradient(self, compute: Callable[[], Tensor], grad: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradient of sum(compute() * grad) in weights; of sharded ones it is the sum over all processes.

        It is to be called in a backward pass, where FSDP keeps weights after a forward pass, which is then that of a
        layer computed again: they are freed here.
        """
        return self.together(GRADIENT, partial(self._gradient, partial(self.inside, compute), grad, trained))

    def _gradient(self, compute: Callable[[], Tensor], grad: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
        before = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        with contextlib.ExitStack() as held:
            for module, state in self._layers:
                held.enter_context(module.register_forward_hook(partial(_free, state._modules[0])))
            try:
                scores = compute()
                scores.backward(grad.expand_as(scores))
                return [_total(p.grad) for p in trained]
            finally:
                for p, kept in zip(trained, before, strict=True):
                    p.grad = kept

    def take_part(self, kind: int) -> None:
        """Do a pass over two tokens whose result is dropped, since other processes need this one's weights."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self._owner.device)

        def scores() -> Tensor:
            return self._owner.logits(self._owner.hidden_of_texts(ids, None)[0], 1.0)

        def work() -> None:
            if kind == GRADIENT:
                trained = [p for p in self._network.parameters() if p.requires_grad]
                zero = torch.zeros((), device=ids.device)
                _in_backward(lambda: _keep(self._gradient(partial(self.inside, scores), zero, trained), trained))
            elif kind == HEAD:
                self.inside(_nothing)
            else:
                self._owner.hidden_of_texts(ids, None)

        with counting(()), torch.no_grad():
            self._run(work)


def _nothing() -> None:
    pass


def _free(module: Any, *_: Any) -> None:
    """Free the gathered weights of a module that FSDP has sharded."""
    module.reshard()


def _keep(grads: Sequence[Tensor | None], trained: Sequence[Tensor]) -> None:
    """Add to this process's parts what other processes' gradients are in them."""
    for p, grad in zip(trained, grads, strict=True):
        if grad is not None and is_sharded(p):
            p.grad = grad if p.grad is None else p.grad + grad


def _total(grad: Tensor | None) -> Tensor | None:
    """Return the sum of a gradient over processes, where FSDP has their mean."""
    mesh: Any = getattr(grad, "device_mesh", None)
    return grad if grad is None or mesh is None else grad * mesh.size()


class _InBackward(torch.autograd.Function):
    """Calls a function in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Callable[[], Any]) -> Tensor:
        ctx.work = work
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.work()
        return grad, None


def _in_backward(work: Callable[[], Any]) -> None:
    """Call a function in a backward pass, where FSDP does other things than outside."""
    with torch.enable_grad():
        _InBackward.apply(torch.zeros((), requires_grad=True), work).backward()


def _hooked(module: nn.Module, work: Callable[[], T]) -> Callable[[], T]:
    """Return what computes something as a module's forward pass, with FSDP's hooks and no others."""
    new: Any = with_forward(module, lambda: work())  # no module itself: torch would note it as a part
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        kept = {key: hook for key, hook in getattr(module, name).items() if fsdp_state(hook) is not None}
        setattr(new, name, type(getattr(module, name))(kept))
    called: Callable[[], T] = new
    return called


_known: WeakValueDictionary[int, Shards] = WeakValueDictionary()  # by the numbers of their networks


def shards_of(network: nn.Module, body: nn.Module | None, owner: ComputesPasses) -> Shards | None:
    """Return the passes of a network that is sharded; None of any other."""
    if not take_in(network):
        return None
    found = Shards(network, body, owner)
    _known[number_of(network)] = found
    return found


def _take_part(wanted: Wanted) -> None:
    """Do a pass that other processes want."""
    if wanted.kind == TENSOR:
        gather(wanted)
        return
    shards = _known.get(wanted.network)
    if shards is None:
        raise RuntimeError(
            "another process computes with a sharded network that this one has not used: use it on all of them"
        )
    shards.take_part(wanted.kind)


def passes_together(
    agree: Callable[[list[int]], list[list[int]]], uninterrupted: Callable[[], contextlib.AbstractContextManager[None]]
) -> Lockstep:
    """Return the passes of the processes of a run, see `Lockstep`."""
    return Lockstep(agree, uninterrupted, count, _take_part)
