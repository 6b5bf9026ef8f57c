"""Sites of a program: its sample statements, as they stand in the trace of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.functional import pad

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import reward_name

from .errors import ProgramError
from .handlers import PROMPTS


@dataclass(frozen=True)
class Site:
    """A sample statement of a program.

    :param kind: "latent", "observed" (factors too) or "deterministic".
    :param fn: its distribution when the program was inspected.
    :param shape: of its value, (*batch, *event).
    :param plates: the plate of each batch dimension, by its negative index.
    :param batch_dims: the number of batch dimensions.
    :param value: its value when the program was inspected.
    :param masked: whether a mask hides some of its log-probabilities.
    """

    name: str
    kind: str
    fn: Any
    shape: tuple[int, ...]
    plates: dict[int, str]
    batch_dims: int
    value: Tensor
    masked: bool

    @property
    def in_prompts(self) -> bool:
        return PROMPTS in self.plates.values()

    @property
    def is_pointwise(self) -> bool:
        """Whether it holds many observations, in plates that do not include the prompts'."""
        return self.kind == "observed" and self.value.numel() > 0 and bool(self.plates) and not self.in_prompts

    @property
    def reward(self) -> str | None:
        """The name of the reward that it records (`rewards.factor`), or None."""
        return reward_name(self.name) if self.kind == "deterministic" else None

    @property
    def is_completion(self) -> bool:
        return isinstance(self.fn, Autoregressive)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the axes of its value, (*batch, *event)."""
        event = len(self.shape) - self.batch_dims
        names = {dim: "prompt" if plate == PROMPTS else plate for dim, plate in self.plates.items()}
        batch = [names.get(i - self.batch_dims, f"{self.name}_batch_{i}") for i in range(self.batch_dims)]
        if self.is_completion:
            return (*batch, "token")
        return (*batch, *(f"{self.name}_dim_{i}" for i in range(event)))


def site_value(site: Site, value: Tensor, num_particles: int) -> Tensor:
    """Return a site's value as (particle, *batch, *event), without the axes that vectorisation put between."""
    shape = (num_particles, *site.shape)
    if value.numel() == torch.Size(shape).numel():
        return value.reshape(shape)
    return value.expand(shape)


def sample_sites(trace: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and nodes of a trace's sample statements, factors and observations included."""
    return ((name, dict(node)) for name, node in trace.nodes.items() if node["type"] == "sample")


def in_prompts(node: dict[str, Any]) -> bool:
    """Return whether a trace's node is inside the plate of prompts."""
    return any(frame.name == PROMPTS for frame in node["cond_indep_stack"])


def vectorised_plates(node: dict[str, Any]) -> list[Any]:
    """Return the vectorised plates of a trace's node."""
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


def site_of(name: str, node: dict[str, Any]) -> Site:
    """Return a trace's node as a site."""
    frames = vectorised_plates(node)
    deterministic = node["infer"].get("_deterministic", False)
    kind = "deterministic" if deterministic else "observed" if node["is_observed"] else "latent"
    shape = tuple(node["value"].shape)
    batch_dims = len(node["fn"].batch_shape)
    if deterministic:  # Pyro counts a deterministic value's batch dims as event dims unless event_dim says otherwise
        batch_dims = max((-frame.dim for frame in frames), default=0)
        shape = (1,) * (batch_dims - len(shape)) + shape
        sizes = {batch_dims + frame.dim: frame.size for frame in frames}
        shape = tuple(sizes.get(i, size) if size == 1 else size for i, size in enumerate(shape))
    plates = {frame.dim: frame.name for frame in frames}
    masked = node["mask"] is not None or isinstance(node["fn"], MaskedDistribution)
    return Site(name, kind, node["fn"], shape, plates, batch_dims, node["value"], masked)


def check_site(site: Site, node: dict[str, Any]) -> None:
    """Check that engines would compute a site's weights rightly.

    :raises ProgramError: if they would not.
    """
    shape = node["fn"].batch_shape
    stray = [size for i, size in enumerate(shape) if size > 1 and i - len(shape) not in site.plates]
    if stray and (site.kind != "deterministic" or site.reward is not None):
        raise ProgramError(
            f"site {site.name!r} has a batch dimension of size {stray[0]} that no plate declares: "
            "put it inside a pyro.plate, or make it part of the event with .to_event(1)"
        )
    # `Minibatch` removes the prompts' frame
    subsampled = any(frame.full_size not in (None, frame.size) for frame in vectorised_plates(node))
    if subsampled or (site.kind == "latent" and not _is_one(node["scale"])):
        raise ProgramError(f"site {site.name!r} is subsampled or scaled: its particles cannot be weighed")


def _is_one(scale: Any) -> bool:
    return bool(torch.as_tensor(scale == 1.0).all())


# -- prompts of completions, as tensors ------------------------------------------------------------------------


def prompts_of(fn: Autoregressive, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (particle, *batch, length) of the prompt of every completion.

    :param shape: (particle, *batch).
    """
    mask = torch.ones_like(fn.prompt_ids) if fn.prompt_mask is None else fn.prompt_mask
    return of_each(fn, fn.prompt_ids, shape), of_each(fn, mask, shape)


def of_each(fn: Autoregressive, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor (*batch, n) of a distribution as (particle, *batch, n).

    :param fn: may lack the dimension of particles, where its value was replayed.
    """
    x = x.expand(*fn.batch_shape, -1)
    return x.reshape(*shape, -1) if fn.batch_shape.numel() == torch.Size(shape).numel() else x.expand(*shape, -1)


def same_prompts(ids: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> bool:
    """Return whether left-padded prompts are equal, without regard to their padding."""
    return torch.equal(*side_by_side([ids.masked_fill(mask == 0, -1), other.masked_fill(other_mask == 0, -1)]))


def side_by_side(ids: list[Tensor]) -> list[Tensor]:
    """Return tensors of ids (..., length) that are left-padded with -1 to the same length."""
    longest = max(x.shape[-1] for x in ids)
    return [pad(x, (longest - x.shape[-1], 0), value=-1) for x in ids]
