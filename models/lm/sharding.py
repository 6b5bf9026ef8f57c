"""Networks that are sharded by ``fully_shard`` (FSDP2): of each weight every process holds a part.

Which ones they are, how to put them together, and copies of them. `sharded_passes` computes with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from bayeslm.validation import validated

from .lockstep import TENSOR, Wanted, announced
from .module_copies import shallow, with_parameters

DISTRIBUTED = {"DTensor", "FlatParameter"}  # by their names: PyTorch imports neither before it is used

networks: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers: Any = WeakIdKeyDictionary()  # of each sharded network, in the order in which they became known
_managed: Any = WeakIdKeyDictionary()  # of each of their parameters the network's number, and its place there
_count = 0


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is distributed over processes."""
    return not DISTRIBUTED.isdisjoint(each.__name__ for each in type(x).__mro__)


def own_part(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of one that is not sharded."""
    part: Tensor = x.detach().to_local() if is_sharded(x) else x.detach()  # type: ignore[attr-defined]
    return part


def in_parts_like(value: Tensor, x: Tensor) -> Tensor:
    """Return a whole value as parts, if a tensor is in parts; each process keeps its own."""
    if not is_sharded(x) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Any = x
    return distribute_tensor(value.to(x.device), placed.device_mesh, placed.placements, src_data_rank=None)


def has_shards(network: nn.Module) -> bool:
    """Return whether a network has parameters that are distributed over processes."""
    return any(is_sharded(p) for p in network.parameters())


@validated
def refuse_sharded(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that are distributed over processes in another way than a network's by ``fully_shard``.

    :param named: the parameters with their names.
    :raises TypeError: if one is, as by FSDP1 or tensor parallelism.
    """
    for name, x in named:
        if is_sharded(x) and x not in _managed:
            placed = f" as {list(x.placements)}" if hasattr(x, "placements") else ""
            raise TypeError(
                f"the parameter {name!r} is a {type(x).__name__}, distributed over processes{placed}, each of which "
                "has a part alone: it would be scored or trained wrongly. Hand in a network that is whole, or sharded "
                "by fully_shard (FSDP2) over all processes of the launch, as LanguageModel.shard() does; FSDP1 and "
                "tensor parallelism are not supported"
            )


def refuse_shards(network: nn.Module, what: str) -> None:
    """Refuse a sharded network where the whole weights are needed.

    :raises TypeError: with what needs them.
    """
    if has_shards(network):
        raise TypeError(
            f"{what} of a network that is sharded by fully_shard would gather all of its weights on every process: do "
            "it before sharding, or save_pretrained() the network and load it whole"
        )


def take_in(network: nn.Module) -> bool:
    """Note a network that is sharded, and return whether it is.

    :raises TypeError: if it is sharded in a way that is not supported.
    """
    global _count
    sharded = [p for p in network.parameters() if is_sharded(p)]
    if not sharded:
        return False
    states = states_of(network)
    of_fsdp = [p for _, state in states for group in state._fsdp_param_groups for p in _parameters_of(group)]
    known = {id(p) for p in of_fsdp}
    if any(id(p) not in known for p in sharded):
        refuse_sharded((name, p) for name, p in network.named_parameters() if id(p) not in known)
    if network not in _numbers:
        _check(states)
        _count += 1
        _numbers[network] = _count
        networks[_count] = network
    for i, p in enumerate(network.parameters()):
        if is_sharded(p) and p not in _managed:
            _managed[p] = (_numbers[network], i)
    return True


def _check(states: list[tuple[nn.Module, Any]]) -> None:
    """Check that FSDP has sharded a network in a way that is supported.

    :raises TypeError: if not, with what to do.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    wrong = ""
    if not hasattr(FSDPModule, "reset_iter_state"):
        wrong = f"PyTorch {torch.__version__} cannot begin a pass anew, which 2.13 can: install that"
    for _, state in states:
        for group in state._fsdp_param_groups:
            mesh = group.mesh_info.mesh
            if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
                wrong = f"its mesh is {mesh}: shard over one axis of all {dist.get_world_size()} processes"
            if group.gradient_divide_factor is not None:
                wrong = (
                    f"set_gradient_divide_factor({group.gradient_divide_factor}) changes its gradients: leave it out"
                )
        if len(state._modules) > 1:
            wrong = "fully_shard was given several modules at once: give it one after another"
    if wrong:
        raise TypeError(f"a network that is sharded by fully_shard is not supported: {wrong}")


def shard(network: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shard a network, in place, over all processes: each of its layers, and what is outside them.

    :raises RuntimeError: if no processes were launched together.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        try:
            dist.init_process_group()
        except ValueError as error:
            raise RuntimeError(
                "shard() divides a network among processes that were launched together: use torchrun or accelerate "
                f"launch ({error})"
            ) from error
    kind = next(network.parameters()).device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


def fsdp_state(hook: Any) -> Any:
    """Return FSDP's state whose hook it is; None for any other hook."""
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    owner = getattr(hook, "__self__", None)
    return owner if type(owner).__name__ == "FSDPState" else None


def states_of(network: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return the modules that FSDP has sharded, from outside in, with its state of each."""
    found = []
    for module in network.modules():
        states = [state for hook in module._forward_pre_hooks.values() if (state := fsdp_state(hook)) is not None]
        found += [(module, state) for state in states]
    return found


def _parameters_of(group: Any) -> list[nn.Parameter]:
    return [each.sharded_param for each in group.fsdp_params]


def number_of(network: nn.Module) -> int:
    """Return the number of a sharded network that is known."""
    return int(_numbers[network])


def count() -> int:
    """Return how many sharded networks this process has met."""
    return _count


# -- whole weights -------------------------------------------------------------------------------------------


def gather(wanted: Wanted) -> Tensor:
    """Return a tensor put together; all processes must call this."""
    if wanted.network:
        parts: Any = list(networks[wanted.network].parameters())[wanted.which]
    else:
        parts = _offered[-1]()[wanted.which]
    found: Tensor = parts.detach().full_tensor()
    return found


def whole(x: Tensor) -> Tensor:
    """Return a network's parameter put together, or itself if it is not sharded."""
    if not is_sharded(x):
        return x.detach()
    wanted = Wanted(TENSOR, *_managed[x])
    value: Tensor = announced(wanted, partial(gather, wanted))
    return value


def unsharded(network: nn.Module, keep: bool = True) -> nn.Module | None:
    """Return a copy of a network whose sharded weights are whole, on the CPU.

    :param keep: whether this process has the copy; else it only takes part, and None is returned.
    """
    values: dict[nn.Parameter, nn.Parameter] = {}
    for p in network.parameters():
        if is_sharded(p):
            value = whole(p)
            values |= {p: nn.Parameter(value.cpu(), requires_grad=False)} if keep else {}
    return with_parameters(network, lambda p: values.get(p, p), None) if keep else None


def whole_state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the names and values of a module's state, each of them whole."""
    sharded = {name: p for name, p in network.named_parameters(remove_duplicate=False) if is_sharded(p)}
    for name, x in network.state_dict().items():
        yield name, whole(sharded[name]) if name in sharded else x


_offered: list[Callable[[], Sequence[Tensor]]] = []


@contextlib.contextmanager
def offering(tensors: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Take part, in the block, when other processes put tensors together that are sharded and no network's.

    :param tensors: returns them, in an order that is the same on all processes.
    """
    _offered.append(tensors)
    try:
        yield
    finally:
        _offered.pop()


@validated
def whole_offer(which: int) -> Tensor:
    """Return one of the tensors that `offering` offers, put together."""
    wanted = Wanted(TENSOR, 0, which)
    value: Tensor = announced(wanted, partial(gather, wanted))
    return value


# -- copies --------------------------------------------------------------------------------------------------


def twin(network: nn.Module) -> nn.Module:
    """Return new modules around the same sharded weights: adapters put into the twin do not change the network.

    Modules without others inside are shared, and so are the hooks that gather their weights.
    """
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if not module._modules:
            return module
        if module not in copies:
            copies[module] = new = shallow(module)
            new._modules = {name: None if x is None else copied(x) for name, x in module._modules.items()}
        return copies[module]

    return copied(network)


def copy_of(network: nn.Module, dtype: Callable[[nn.Parameter], torch.dtype]) -> nn.Module:
    """Return a copy that is sharded in the same way, with weights of its own; no process holds a whole one.

    :param dtype: of the copy of a parameter.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import fully_shard

    modules: dict[nn.Module, nn.Module] = {}
    empty: dict[Any, nn.Parameter] = {}  # the copy of a parameter, without memory

    def without(p: nn.Parameter) -> nn.Parameter:
        if p not in empty:
            empty[p] = nn.Parameter(torch.empty(p.shape, dtype=dtype(p), device="meta"), p.requires_grad)
        return empty[p]

    def copied(module: nn.Module) -> nn.Module:
        if module not in modules:
            modules[module] = new = shallow(module)
            own = {key for hooks in _hooks(module) for key, hook in hooks.items() if fsdp_state(hook) is not None}
            for name in FORWARD_HOOKS:
                hooks = getattr(module, name)
                setattr(new, name, type(hooks)((key, hook) for key, hook in hooks.items() if key not in own))
            for key in (REGISTRY_KEY, STATE_KEY):
                new.__dict__.pop(key, None)
            new._parameters = {name: None if p is None else without(p) for name, p in module._parameters.items()}
            new._buffers = {name: None if x is None else x.clone() for name, x in module._buffers.items()}
            new._modules = {name: None if x is None else copied(x) for name, x in module._modules.items()}
        return modules[module]

    new = copied(network)
    for module, state in reversed([*states_of(network)]):  # from inside out: what is whole is one layer
        _allocate(modules[module], empty)
        for group in state._fsdp_param_groups:
            settings = {"mesh": group.mesh_info.mesh, "mp_policy": group.mp_policy}
            fully_shard(modules[module], **settings, offload_policy=group.offload_policy)
    _allocate(new, empty)
    with torch.no_grad():
        for (_, p), (_, q) in zip(network.named_parameters(), new.named_parameters(), strict=True):
            own_part(q).copy_(own_part(p))
    return new


FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_pre_hooks, module._forward_hooks]


def _allocate(module: nn.Module, empty: dict[Any, nn.Parameter]) -> None:
    """Give a module memory for those of its parameters that have none yet."""
    devices = {id(x): p.device for p, x in empty.items()}
    made: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, x in each._parameters.items():
            if x is not None and x.is_meta:
                made.setdefault(id(x), nn.Parameter(torch.empty_like(x, device=devices[id(x)]), x.requires_grad))
                each._parameters[name] = made[id(x)]
