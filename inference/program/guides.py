"""Guides made of a program: the program itself, up to its last latent, with other distributions of its latents.

A guide draws the program's latents and nothing else. So it runs the program with the distributions of its latents
replaced (a prior language model by a policy, a discrete latent's by free logits), hides factors and observations, and
stops at the last latent: later rewards are not evaluated for the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayeslm.models.lm import LanguageModel, Twist
from bayeslm.validation import validated

from .errors import ProgramError
from .handlers import Assign, Assignment
from .program import Program
from .sites import in_prompts, sample_sites


def check_latents_of_guide(program: Program, trace: Trace) -> None:
    """Check that a guide has no other latents than the program, and in its plate.

    :param trace: of the guide's run.
    :raises ProgramError: if it has.
    """
    for name, node in sample_sites(trace):
        if name not in program.sites and not node["infer"].get("is_auxiliary"):
            raise ProgramError(f"the guide samples {name!r}, which the program does not have")
        if not program.shared and not in_prompts(node):
            raise ProgramError(
                f"the guide samples {name!r} outside the plate 'prompts', and the program's prompts are posteriors "
                "of their own: put it inside the plate (AutoNormal does), or a latent of the program outside"
            )


class _Drawn(BaseException):  # which a program's own `except Exception` lets through
    """The last latent has its value, so that the guide ends."""


class _Redistribute(Messenger):
    """Replace the distributions of latent sites, hide all other sites, and stop at the last latent.

    :param distributions: by site, the function from its distribution to the one that replaces it.
    :param drawn: values of sites that are drawn elsewhere in the guide, and are hidden as well.
    """

    def __init__(
        self, program: Program, distributions: Mapping[str, Callable[[Any], Any]], drawn: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self._program, self._distributions, self._drawn = program, distributions, drawn
        self._last = program.latents[-1].name

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        site = self._program.sites.get(name)
        if name in self._drawn:
            msg["stop"] = True
        elif site_is_subsample(msg):  # visible, so that the program can be given the same subsample
            return
        elif site is None or site.kind != "latent":
            msg["stop"] = True
        elif name in self._distributions:
            msg["fn"] = self._distributions[name](msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self._last:
            raise _Drawn


def draw_latents(
    program: Program,
    distributions: Mapping[str, Callable[[Any], Any]],
    drawn: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run a program as a guide: its latents are drawn from other distributions, its factors and observations hidden.

    :param distributions: by site, the function from its distribution to the one that replaces it.
    :param drawn: values of sites that are drawn elsewhere in the guide, and of subsamples of plates, by name.
    :param args: of the program, as ``kwargs``.
    """
    assign = Assign({name: partial(_constant, value) for name, value in drawn.items()})
    try:
        with _Redistribute(program, distributions, drawn), assign:
            program.model(*args, **kwargs)
    except _Drawn:
        pass


def _constant(value: Tensor, fn: Any) -> Assignment:
    return value, None


@validated
def check_draws_texts(engine: str, guide: Any) -> None:
    """Refuse a twist as a guide.

    :raises TypeError: if it is one.
    """
    if isinstance(guide, Twist):
        raise TypeError(f"{engine}: guide must draw texts, got a Twist, which weighs them: use SMC(twist=...)")


def as_proposal(guide: Callable[..., Any], program: Program) -> Callable[..., Any]:
    """Return a trained guide in the form that proposes particles.

    That is the guide itself; of Pyro's Laplace approximation, which is trained as a point, the normal distribution.

    :raises ProgramError: if the log-joint does not curve down in every direction from the point.
    """
    if not isinstance(guide, AutoLaplaceApproximation):
        return guide
    try:
        normal: Callable[..., Any] = guide.laplace_approximation(*program.args, **program.kwargs)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ProgramError("AutoLaplaceApproximation has found no maximum yet: train it for more steps") from error
    return normal


@validated
class PolicyGuide:
    """A guide in which one language model takes the place of the program's own.

    :raises ProgramError: if the program has no completion.
    """

    is_of_program = True  # see `check_guide`

    def __init__(self, program: Program, policy: LanguageModel) -> None:
        if not program.completions:
            raise ProgramError("the program has no completion site: a LanguageModel cannot be its guide")
        self._program = program
        self._distributions = {site.name: lambda fn: fn.with_model(policy) for site in program.completions}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        draw_latents(self._program, self._distributions, {}, args, kwargs)
