"""Adam for the parameters of a guide: its settings, and the one of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from bayeslm.inference.program import ranks
from bayeslm.models.lm import in_parts_like, is_sharded, own_part, refuse_sharded
from bayeslm.validation import Positive, Within, validated

from .movement import Movement
from .state import State

Decay = Annotated[float, Within("[0, 1)")]
FUSED = ("cpu", "cuda")  # where Adam has a fused kernel
SCHEDULES: dict[str, Callable[[float], float]] = {  # of the share of the budget that is used
    "constant": lambda share: 1.0,
    "linear": lambda share: max(0.0, 1.0 - share),
    "cosine": lambda share: max(0.0, 0.5 * (1.0 + math.cos(math.pi * share))),
}


@validated
@dataclass(frozen=True)
class Adam:
    """Settings of Adam (Kingma and Ba 2015, arXiv 1412.6980), its learning rates and their schedule.

    :param learning_rate: at the start. None: 1e-3, and 3e-4 for adapters (1e-3 can lead SmolLM2 away from its posterior
        with as few particles as 8).
    :param latent_learning_rate: of the default guide's distributions of latents that are not completions, whose few
        parameters have further to go than a network's.
    :param schedule: "constant", or "linear" or "cosine" decay to 0 at the last step.
    :param clip_norm: the largest norm of a gradient, of the mean over prompts; None clips nothing.
    :param betas: decay of the averages of gradients and of squared gradients, a step. Squares are averaged over some 20
        steps, not over Adam's usual 1000, which is more than a complete training has: those of the start, far from the
        posterior and large, would hold steps small to its end.
    :raises ValueError: if a setting is out of range.
    """

    learning_rate: Positive | None = None
    latent_learning_rate: Positive = 3e-2
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    clip_norm: Positive | None = 1.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)

    def rates(self, has_adapters: bool) -> tuple[float, float]:
        """Return the learning rates at the start, of all parameters but the latents', and of these.

        :param has_adapters: whether the policy's adapters are trained, not all of its weights.
        """
        return self.learning_rate or (3e-4 if has_adapters else 1e-3), self.latent_learning_rate

    def start(
        self,
        rate_of: Callable[[str], float],
        share: Callable[[], float],
        num_prompts: int,
        movement: Callable[[], Movement],
    ) -> ScheduledAdam:
        """Return the optimizer of a run; see `ScheduledAdam`. It does not measure how far the guide moves."""
        return ScheduledAdam(self, rate_of, share, num_prompts)

    @property
    def can_be_extended(self) -> bool:
        """Whether a training may go on where a smaller budget has ended."""
        return self.schedule == "constant"


class ScheduledAdam(PyroOptim):
    """Adam over all parameters of a run at once, with the gradient clipped by its global norm.

    (Pyro's own optimisers hold one optimiser a parameter, and clip each parameter by itself. One fused kernel for all
    parameters where there is one: an adapter has hundreds of small ones, and a loop over them costs more than Adam.)

    ``gradient_norm`` is the last step's, before it was clipped, of the mean over prompts, and ``factor`` what its
    learning rates were multiplied by.

    :param settings: Adam's.
    :param rate_of: the learning rate of a parameter, by its name in Pyro's store.
    :param share: returns the share of the run's budget that is used.
    :param num_prompts: over which the loss is a sum. The norm that is clipped is that of the gradient of their mean, so
        that it does not depend on how many they are.
    """

    def __init__(
        self, settings: Adam, rate_of: Callable[[str], float], share: Callable[[], float], num_prompts: int
    ) -> None:
        super().__init__(torch.optim.Adam, {})
        self._rate_of = rate_of
        self._betas = settings.betas
        self._share, self._factor_of = share, SCHEDULES[settings.schedule]
        self.factor = 1.0
        self._num_prompts = num_prompts
        self._clip = math.inf if settings.clip_norm is None else settings.clip_norm * num_prompts
        self._adam: torch.optim.Adam | None = None
        self._names: dict[Tensor, str] = {}  # in Adam's own order
        self._sharded: set[Tensor] = set()  # those of them that are parts of whole ones
        self.first: dict[str, Tensor] = {}  # copies of the parameters before the first step
        self.steps = 0
        self.gradient_norm = 0.0
        self.moved: float | None = None  # KL of the last step, if the optimizer measures it

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Move the parameters by their gradients.

        :raises ValueError: if there are no parameters.
        :raises FloatingPointError: if the gradient is not finite.
        """
        store = pyro.get_param_store()
        if new := set(params) - self._names.keys():
            self._add({p: str(store.param_name(p)) for p in new})
        if self._adam is None:
            raise ValueError("the guide has no parameters that require a gradient: there is nothing to train")
        self._add_up()
        self.factor = self._next_factor()
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * self.factor
        self.gradient_norm = self._clipped() / self._num_prompts
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError(f"the gradient is {self.gradient_norm}")
        self.steps += 1  # before the guide moves: a step that is stopped from here on is not as if it had not begun
        self._move()

    def _add_up(self) -> None:
        """Replace the gradients by their sums over the processes of the run."""
        if ranks().size > 1:
            for p in self._names:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            ranks().add_up([p.grad for p in self._names if p.grad is not None and p not in self._sharded])

    def _clipped(self) -> float:
        """Clip the gradient, and return its norm before."""
        parts = [own_part(p.grad) for p in self._names if p.grad is not None and p in self._sharded]
        if not parts:
            return float(torch.nn.utils.clip_grad_norm_(self._names, self._clip))
        rest = [p.grad for p in self._names if p.grad is not None and p not in self._sharded]
        square = ranks().total(torch.nn.utils.get_total_norm(parts).double() ** 2)  # FSDP has added them up
        norm = math.sqrt(float(square) + (float(torch.nn.utils.get_total_norm(rest)) ** 2 if rest else 0.0))
        if self._clip < norm + 1e-6:  # as torch's clip_grad_norm_
            torch._foreach_mul_(parts + rest, self._clip / (norm + 1e-6))
        return norm

    def _next_factor(self) -> float:
        return self._factor_of(self._share())

    def warn_if_stuck(self) -> None:
        """Warn at the end of a run whose steps led nowhere."""

    def _move(self) -> None:
        assert self._adam is not None
        self._adam.step()
        # the fused kernel does not report its changes to torch, and kept scores must not outlive them
        torch.autograd.graph.increment_version(list(self._names))

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters that it moves, by name."""
        return {name: p for p, name in self._names.items()}

    def _add(self, names: Mapping[Tensor, str]) -> None:
        """Move these too. Params are a set: taken in the order of their names, so that a seed reproduces the run."""
        refuse_sharded((name, p) for p, name in names.items())
        self._sharded |= {p for p in names if is_sharded(p)}
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for p in sorted(names, key=names.__getitem__):
            groups.setdefault((self._rate_of(names[p]), p in self._sharded), []).append(p)
            mesh: Any = getattr(p, "device_mesh", None)
            if mesh is not None and mesh.size() != ranks().size:
                raise RuntimeError(
                    f"SVI: {names[p]!r} is sharded over {mesh.size()} processes, of which {ranks().size} "
                    "train it: run the training on all of them together, outside of callbacks and rewards"
                )
        for (rate, _), group in groups.items():
            fused = all(p.device.type in FUSED for p in group)
            settings: dict[str, Any] = {"params": group, "lr": rate, "rate": rate, "fused": fused}
            if self._adam is None:
                self._adam = torch.optim.Adam([settings], betas=self._betas)
            else:
                self._adam.add_param_group(settings)
            self._names |= {p: names[p] for p in group}
            self.first |= {names[p]: p.detach().clone() for p in group}

    # `state_dict` and `load_state_dict` would be Pyro's own names, for states of another form.
    def moments(self) -> State:
        """Return the state of Adam, as "moment.parameter"."""
        names = list(self._names.values())
        state = {} if self._adam is None else self._adam.state_dict()["state"]
        return {f"{key}.{names[i]}": value for i, each in state.items() for key, value in each.items()}

    def restore(self, moments: State, params: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `moments` returned after so many steps.

        :param params: all parameters that were moved, by name.
        """
        self._add({p: name for name, p in params.items()})
        self.steps = steps
        if self._adam is None:
            return
        places = {name: i for i, name in enumerate(self._names.values())}
        state: dict[int, dict[str, Tensor]] = {}
        for entry, value in moments.items():
            key, _, name = entry.partition(".")
            state.setdefault(places[name], {})[key] = in_parts_like(value, params[name]) if value.dim() else value
        self._adam.load_state_dict(self._adam.state_dict() | {"state": state})
