"""What moves the parameters of a guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class ScheduledAdam(PyroOptim):
    """Adam over all parameters at once, with the gradient clipped by its global norm and a learning-rate schedule.

    (Pyro's own optimisers hold one optimiser a parameter, and clip each parameter by itself. One fused kernel for all
    parameters where there is one: an adapter has hundreds of small ones, and a loop over them costs more than Adam.)

    Squared gradients are averaged over some 20 steps, not Adam's 1000, which is more than a whole training has: those
    of the start, far from the posterior and large, would hold steps small to its end.

    :param rate_of: the learning rate of a parameter, by its name in Pyro's store.
    :param num_prompts: that the loss is a sum over. The norm that is clipped, and told as ``gradient_norm``, is that of
        the gradient of their mean, so that neither depends on how many they are.
    """

    def __init__(
        self, rate_of: Callable[[str], float], num_steps: int, schedule: str, clip_norm: float | None, num_prompts: int
    ) -> None:
        super().__init__(torch.optim.Adam, {})
        self._rate_of = rate_of
        self._num_steps = num_steps
        self._schedule = SCHEDULES[schedule]
        self.factor = 1.0  # of the learning rates in the last step
        self._num_prompts = num_prompts
        self._clip = math.inf if clip_norm is None else clip_norm * num_prompts
        self._adam: torch.optim.Adam | None = None
        self._names: dict[Tensor, str] = {}
        self.steps = 0
        self.gradient_norm = 0.0

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        store = pyro.get_param_store()
        self._add({p: str(store.param_name(p)) for p in set(params) - self._names.keys()})
        if self._adam is None:
            raise ValueError("the guide has no parameters that require a gradient: there is nothing to train")
        self.factor = self._schedule(self.steps / self._num_steps)
        for settings in self._adam.param_groups:
            settings["lr"] = settings["rate"] * self.factor
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self._names, self._clip)) / self._num_prompts
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError(f"the gradient is {self.gradient_norm}")
        self._adam.step()
        # the fused kernel does not tell torch of its changes, and kept scores must not outlive them
        torch.autograd.graph.increment_version(list(self._names))
        self.steps += 1

    @property
    def names(self) -> set[str]:
        """The parameters that it has been given."""
        return set(self._names.values())

    def _add(self, names: dict[Tensor, str]) -> None:
        """Move these too. Params are a set: taken in the order of their names, so that a seed reproduces the run."""
        groups: dict[float, list[Tensor]] = {}
        for p in sorted(names, key=names.__getitem__):
            groups.setdefault(self._rate_of(names[p]), []).append(p)
        for rate, group in groups.items():
            fused = all(p.device.type in FUSED for p in group)
            settings: dict[str, Any] = {"params": group, "lr": rate, "rate": rate, "fused": fused}
            if self._adam is None:
                self._adam = torch.optim.Adam([settings], betas=BETAS)
            else:
                self._adam.add_param_group(settings)
            self._names |= {p: names[p] for p in group}

    # `state_dict` would be Pyro's own name, for a state of another form.
    def moments(self) -> dict[str, Tensor]:
        """Adam's state by parameter, as "moment.parameter", to go on from."""
        if self._adam is None:
            return {}
        moments: dict[str, Tensor] = {}
        for p, name in self._names.items():
            # a parameter that has had no gradient has no state yet, which is as good as zeros
            state = self._adam.state[p] or {"step": torch.tensor(0.0)} | {k: torch.zeros_like(p) for k in MOMENTS[1:]}
            moments |= {f"{key}.{name}": state[key] for key in MOMENTS}
        return moments

    def load_moments(self, moments: Mapping[str, Tensor], params: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `moments` gave after so many steps, with the parameters of these names."""
        names = [key.partition(".")[2] for key in moments if key.startswith("step.")]
        self._add({params[name]: name for name in names})
        for settings in [] if self._adam is None else self._adam.param_groups:
            for p in settings["params"]:
                state = {key: moments[f"{key}.{self._names[p]}"].to(p.device) for key in MOMENTS}
                if not settings["fused"]:
                    state["step"] = state["step"].cpu()  # where Adam's loop over parameters counts
                self._adam.state[p] = state  # type: ignore[union-attr]
        self.steps = step


BETAS = (0.9, 0.95)
FUSED = ("cpu", "cuda")  # where Adam has a fused kernel
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
