"""Guides made for a program: the program itself, up to its last latent, under other laws.

A guide draws the program's latents and nothing else. So it runs the program with every latent's law replaced (a
prior language model by a policy, a continuous latent by a normal, a discrete one by free logits), hides factors and
observations, and stops at the last latent: rewards that come after are not evaluated for the guide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayeslm.models.lm import LanguageModel

from .errors import ProgramError
from .program import Program


class _Drawn(BaseException):  # which a program's own `except Exception` lets through
    """The last latent has its value: the guide is done."""


class _Laws(Messenger):
    """Replaces the laws of latent sites, hides all other sites, and stops at the last latent.

    :param laws: site name -> what its distribution becomes.
    :param values: values that some sites have already, drawn elsewhere in the guide; subsamples of plates too.
    """

    def __init__(
        self, program: Program, laws: dict[str, Callable[[Any], Any]], values: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._program = program
        self._laws = laws
        self._values = values or {}
        self._last = program.latents[-1].name

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        site = self._program.sites.get(name)
        if name in self._values:
            msg["value"] = self._values[name]
            msg["stop"] = True
        elif site_is_subsample(msg):  # seen by what runs the guide, so that the program has the same
            return
        elif site is None or site.kind != "latent":
            msg["stop"] = True
        elif name in self._laws:
            msg["fn"] = self._laws[name](msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self._last:
            raise _Drawn


def draw_latents(
    program: Program,
    laws: dict[str, Callable[[Any], Any]],
    values: dict[str, Tensor] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run a program as a guide: its latents are drawn from other distributions, its factors and observations hidden.

    :param laws: by site, what its distribution becomes.
    :param values: of sites that are drawn elsewhere in the guide, and of subsamples of plates.
    :param args: of the program, as ``kwargs``.
    """
    try:
        with _Laws(program, laws, values):
            program.model(*args, **kwargs)
    except _Drawn:
        pass


def as_law(guide: Callable[..., Any], program: Program) -> Callable[..., Any]:
    """A guide as what draws are of: Pyro's Laplace approximation is trained as a point, and a normal law after that.

    :raises ProgramError: if the log-joint does not curve down in every direction from the point.
    """
    if not isinstance(guide, AutoLaplaceApproximation):
        return guide
    try:
        law: Callable[..., Any] = guide.laplace_approximation(*program.args, **program.kwargs)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ProgramError("AutoLaplaceApproximation has found no maximum yet: train it for more steps") from error
    return law


class PolicyGuide:
    """The program with one language model in the place of its own, as a proposal."""

    def __init__(self, program: Program, policy: LanguageModel) -> None:
        if not program.completions:
            raise ProgramError("the program has no completion site: a LanguageModel cannot be its guide")
        self._program = program
        self._laws = {site.name: lambda fn: fn.with_model(policy) for site in program.completions}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        draw_latents(self._program, self._laws, None, args, kwargs)
