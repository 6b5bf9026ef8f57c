"""Guides made for a program: the program itself, up to its last latent, under other laws.

A guide draws the program's latents and nothing else. So it runs the program with every latent's law replaced (a
prior language model by a policy, a continuous latent by a normal, a discrete one by free logits), hides factors and
observations, and stops at the last latent: rewards that come after are not evaluated for the guide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, Independent, OneHotCategorical
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from bayeslm.models.lm import LanguageModel

from .errors import ProgramError
from .handlers import Arbitrary
from .program import Program, Site


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


def _draw_latents(
    program: Program,
    laws: dict[str, Callable[[Any], Any]],
    values: dict[str, Tensor] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
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
        _draw_latents(self._program, self._laws, None, args, kwargs)


class AutoPolicy(nn.Module):
    """The default guide: trainable copies of the program's language models, and mean-field laws of its other latents.

    A completion's law is a policy's (`LanguageModel.policy`); continuous latents have Pyro's `AutoNormal`;
    categorical and Bernoulli latents have free logits, which begin at the prior's.

    :param lora_rank: as in `LanguageModel.policy`; "auto" gives rank 16 to models that were loaded by name, and
        trains every weight of the others.
    :param start: a language model that the policy begins as, in the place of the prior. If it has adapters, they are
        what is trained (`LanguageModel.continued`).
    :raises ProgramError: if a discrete latent is of another family, or there is no one language model to ``start``.
    :raises ValueError: if ``start`` has adapters, and there is a ``lora_rank``.
    """

    def __init__(
        self, program: Program, lora_rank: int | str | None = "auto", start: LanguageModel | None = None
    ) -> None:
        super().__init__()
        self._program = program
        priors: dict[int, LanguageModel] = {id(site.fn.lm): site.fn.lm for site in program.completions}
        if start is not None and len(priors) != 1:
            raise ProgramError(
                f"the program has {len(priors)} language models, and a policy to begin with stands for one: write a "
                "guide of your own"
            )
        policies = {key: _to_train(start or lm, lora_rank) for key, lm in priors.items()}
        self.policies = nn.ModuleList(policies.values())
        self.logits = nn.ParameterDict()
        self._laws: dict[str, Callable[[Any], Any]] = {}
        continuous = []
        for site in program.latents:
            if site.is_completion:
                self._laws[site.name] = _with_model(policies[id(site.fn.lm)])
            elif site.fn.support.is_discrete:
                self.logits[site.name] = _initial_logits(program, site.name)
                self._laws[site.name] = self._with_logits(site.name)
            else:
                continuous.append(site.name)
        self.eval()  # a law has no dropout; and Pyro stays silent about frozen weights
        self.continuous: AutoNormal | None = None
        if continuous:  # its prototype is a run of the program, which needs no network
            self.continuous = AutoNormal(poutine.block(Arbitrary()(program.model), expose=continuous), init_scale=0.5)

    @property
    def policy(self) -> LanguageModel | None:
        """The trained language model: the first, if the program has several."""
        return self.policies[0] if len(self.policies) else None  # type: ignore[return-value]

    def _with_logits(self, name: str) -> Callable[[Any], Any]:
        logits = self.logits[name]
        event_dims = logits.dim() - self._program.sites[name].batch_dims
        return lambda fn: _replace_logits(fn, pyro.subsample(logits, event_dim=event_dims))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pyro.module("policies", self.policies)
        if self.logits:
            pyro.module("logits", self.logits)
        values = None
        if self.continuous is not None:
            values = self.continuous(*args, **kwargs)
            values |= {plate.name: plate.indices for plate in self.continuous.plates.values()}
        _draw_latents(self._program, self._laws, values, args, kwargs)


def _to_train(lm: LanguageModel, lora_rank: int | str | None) -> LanguageModel:
    if not lm.has_adapters:
        return lm.policy((16 if lm.name else None) if lora_rank == "auto" else lora_rank)  # type: ignore[arg-type]
    if lora_rank != "auto":
        raise ValueError("the policy to begin with has adapters, which are trained on as they are: leave out lora_rank")
    return lm.continued()


def _with_model(policy: LanguageModel) -> Callable[[Any], Any]:
    return lambda fn: fn.with_model(policy)


def _initial_logits(program: Program, name: str) -> nn.Parameter:
    """The prior's logits (*batch, ...), of all prompts."""
    site = program.sites[name]
    if program.in_chunks:
        parts = [_logits(chunk.sites[name]) for chunk in program.chunks]
        return nn.Parameter(program.side_by_side(parts, site.dims.index("prompt")))
    return nn.Parameter(_logits(site))


def _logits(site: Site) -> Tensor:
    fn = site.fn
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not isinstance(fn, Categorical | Bernoulli | OneHotCategorical):
        raise ProgramError(
            f"no default guide for the discrete latent {site.name!r} ({type(fn).__name__}): give SVI your own guide"
        )
    return fn.logits.detach().clone()


def _replace_logits(fn: Any, logits: Tensor) -> Any:
    """The same family with other logits; batch dims that plates added to ``fn`` are broadcast."""
    if isinstance(fn, Independent):
        return _replace_logits(fn.base_dist, logits).to_event(fn.reinterpreted_batch_ndims)
    return type(fn)(logits=logits).expand(fn.batch_shape)
