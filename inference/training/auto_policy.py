"""The default guide of `SVI`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, Independent, OneHotCategorical
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to

from bayeslm.inference.program import Arbitrary, Program, ProgramError, Site, draw_latents
from bayeslm.models.lm import LanguageModel
from bayeslm.validation import Count, Share, validated

UNCONSTRAINED = "_unconstrained"  # ends the names of AutoNormal's auxiliary sites


@validated
class AutoPolicy(nn.Module):
    """The default guide: trainable copies of the program's language models; other latents are independent.

    A completion's distribution is a policy's (`LanguageModel.policy`); continuous latents have Pyro's `AutoNormal`;
    categorical and Bernoulli latents have free logits, which begin at the prior's.

    :param program: the program, inspected.
    :param lora_rank: of the adapters that are trained; None trains every weight. "auto" gives rank 16 to models that
        were loaded by name or have quantised weights, and trains every weight of the others.
    :param start: a language model of which a copy is trained, in the place of the prior's. If it has adapters, the copy
        of these is trained (`LanguageModel.continued`).
    :param lora_layers: the share of the layers that get adapters, the last ones. Those of a ``start`` stay.
    :raises ProgramError: if a discrete latent is of another family, or the program has several language models and
        there is a ``start``.
    :raises ValueError: if ``start`` has adapters, and there is a ``lora_rank``.
    """

    is_of_program = True  # see `check_guide`

    def __init__(
        self,
        program: Program,
        lora_rank: Count | Literal["auto"] | None = "auto",
        start: LanguageModel | None = None,
        lora_layers: Share = 1.0,
    ) -> None:
        super().__init__()
        self._program = program
        priors: dict[int, LanguageModel] = {id(site.fn.lm): site.fn.lm for site in program.completions}
        if start is not None and len(priors) != 1:
            raise ProgramError(
                f"the program has {len(priors)} language models, and a policy to begin with stands for one: write a "
                "guide of your own"
            )
        policies = {key: _to_train(start or lm, lora_rank, lora_layers) for key, lm in priors.items()}
        self.policies = nn.ModuleList(policies.values())
        self.logits = nn.ParameterDict()
        self._distributions: dict[str, Callable[[Any], Any]] = {}
        continuous: list[str] = []
        for site in program.latents:
            if site.is_completion:
                self._distributions[site.name] = _with_model(policies[id(site.fn.lm)])
            elif site.fn.support.is_discrete:
                self.logits[site.name] = _initial_logits(program, site.name)
                self._distributions[site.name] = self._with_logits(site.name)
            else:
                continuous.append(site.name)
        self.determined = tuple(continuous)  # latents whose values follow from those of auxiliary sites
        self.eval()  # a distribution has no dropout; and Pyro stays silent about frozen weights
        self.continuous: AutoNormal | None = None
        if continuous:  # its prototype is a run of the program, which needs no network
            self.continuous = AutoNormal(poutine.block(Arbitrary()(program.model), expose=continuous), init_scale=0.5)

    @property
    def policy(self) -> LanguageModel | None:
        """The trained language model; the first, if the program has several."""
        return self.policies[0] if len(self.policies) else None  # type: ignore[return-value]

    def auxiliary(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the guide's auxiliary values at values (particle, *batch, *event) of the latents.

        They are the continuous latents in `AutoNormal`'s unconstrained coordinates. With them the guide can be scored
        at draws that are not its own.
        """
        found = {}
        for name in self.determined:
            free = biject_to(self._program.sites[name].fn.support).inv(values[name])
            found[name + UNCONSTRAINED] = self._program.under_plate(name, free)
        return found

    def _with_logits(self, name: str) -> Callable[[Any], Any]:
        logits = self.logits[name]
        event_dims = logits.dim() - self._program.sites[name].batch_dims
        return lambda fn: _replace_logits(fn, pyro.subsample(logits, event_dim=event_dims))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pyro.module("policies", self.policies)
        if self.logits:
            pyro.module("logits", self.logits)
        values: dict[str, Tensor] = {}
        if self.continuous is not None:
            values = self.continuous(*args, **kwargs)
            values |= {plate.name: plate.indices for plate in self.continuous.plates.values()}
        draw_latents(self._program, self._distributions, values, args, kwargs)


def _to_train(lm: LanguageModel, lora_rank: int | Literal["auto"] | None, lora_layers: float) -> LanguageModel:
    if not lm.has_adapters:
        rank = (16 if lm.name or lm.is_quantised else None) if lora_rank == "auto" else lora_rank
        return lm.policy(rank, lora_layers=lora_layers)
    if lora_rank != "auto":
        raise ValueError("the policy to begin with has adapters, which keep their rank: leave out lora_rank")
    return lm.continued()


def _with_model(policy: LanguageModel) -> Callable[[Any], Any]:
    return lambda fn: fn.with_model(policy)


def _initial_logits(program: Program, name: str) -> nn.Parameter:
    """Return the prior's logits (*batch, ...), of all prompts."""
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
    """Return the same family with other logits; batch dims that plates added to ``fn`` are broadcast."""
    if isinstance(fn, Independent):
        return _replace_logits(fn.base_dist, logits).to_event(fn.reinterpreted_batch_ndims)
    return type(fn)(logits=logits).expand(fn.batch_shape)
