"""A program run in parts: up to its next completion, with the latents that particles have so far.

Resampling exchanges particles in mid-program, and values that Python has already computed from them are then
another particle's. So the program is never resumed: it is run again from its start, with the latents so far given
(no network runs for them), and goes on from there. Terms that were there before must come out as the resampled
particles carried them; where they do not, the program mixes particles, and cannot be split.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .assign import same_law
from .errors import ProgramError, explained
from .particles import Particles
from .program import PARTICLES, Program, sample_sites
from .run import run_particles, site_terms, site_value


class _Reached(BaseException):  # which a program's own `except Exception` lets through
    """The program has come to where this part of it ends."""


@dataclass
class Written:
    """A completion that particles have: its tokens' scores (particle, *batch, token) and whose prompts they follow."""

    scores: Tensor
    prompt_ids: Tensor  # (particle, *batch, length)
    prompt_mask: Tensor


@dataclass
class History:
    """Particles in mid-program: latents so far, and the terms (particle, weight prompt) of sites before the next.

    ``retained`` has values (slot, *batch, *event) that the particles ``slots`` take instead of drawing their own.
    """

    program: Program
    size: int
    retained: dict[str, Tensor]
    slots: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)

    def select(self, index: Tensor) -> None:
        """Particles become those that ``index`` (particle, weight prompt) names."""
        take = self.program.take
        self.values = {name: take(name, value, index) for name, value in self.values.items()}
        self.terms = {name: term.gather(0, index) for name, term in self.terms.items()}
        for name, was in self.written.items():
            parts = (was.scores, was.prompt_ids, was.prompt_mask)
            self.written[name] = Written(*(take(name, part, index) for part in parts))

    @property
    def likelihood(self) -> dict[str, Tensor]:
        """The terms of factors and observations so far."""
        return {name: term for name, term in self.terms.items() if self.program.sites[name].kind == "observed"}

    @property
    def complete(self) -> bool:
        """Whether every completion is written."""
        return all(site.name in self.values for site in self.program.completions)

    def advance(self) -> tuple[str, Autoregressive]:
        """Run to the next completion: its site and law.

        Latents on the way are drawn from the prior. New terms are left in ``terms``.

        :raises ProgramError: if a term that was there before has changed.
        """
        trace, law = self._run(self.values, stop="completion")
        self._note(trace)
        for name, node in sample_sites(trace):
            site = self.program.sites[name]
            if site.kind == "latent" and name not in self.values:
                self.values[name] = site_value(site, node["value"], self.size)
        if law is None:
            missing = [site.name for site in self.program.completions if site.name not in self.values]
            raise ProgramError(f"site {missing[0]!r} is gone: the program's sites depend on its latents")
        return law

    def begin(self, name: str, law: Autoregressive) -> None:
        """Note the prompts of a completion that is to be written."""
        ids, mask = _prompts(law, (self.size, *self.program.sites[name].shape[:-1]))
        self.written[name] = Written(torch.zeros_like(ids), ids, mask)

    def write(self, name: str, value: Tensor, scores: Tensor) -> None:
        """Give particles the completion of a site: tokens and scores, of any shape with (particle, *batch, token)."""
        shape = (self.size, *self.program.sites[name].shape)
        self.values[name] = value.reshape(shape)
        self.written[name].scores = scores.reshape(shape)

    def terms_with(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms (particle, prompt) of the factors and observations that follow, up to the next latent.

        :param values: the latents so far, of any number of particles, with a completion to try.
        """
        trace, _ = self._run(values, stop="latent")
        skip = {*self.terms, *(site.name for site in self.program.latents)}
        return site_terms(self.program, trace, len(next(iter(values.values()))), skip=skip)

    def finish(self) -> Particles:
        """Run the whole program at its latents: particles as every engine has them."""
        with _Given(self, self.values, self.written):
            particles = run_particles(self.program, None, self.size)
        self._check({name: particles.log_likelihood[name] for name in self.terms if name in particles.log_likelihood})
        return particles

    def _run(self, values: dict[str, Tensor], stop: str) -> tuple[Trace, tuple[str, Autoregressive] | None]:
        size = len(next(iter(values.values()))) if values else self.size
        tracer = poutine.trace()
        given = _Given(self, values, self.written if stop == "completion" else {}, stop)
        plate = pyro.plate(PARTICLES, size, dim=-1 - self.program.max_plate_nesting)
        with contextlib.suppress(_Reached), explained(), torch.no_grad(), tracer, given, plate:
            self.program.model(*self.program.args, **self.program.kwargs)
        trace = prune_subsample_sites(tracer.trace)
        for name, _ in sample_sites(trace):
            if name not in self.program.sites:
                raise ProgramError(f"site {name!r} was not there before: the program's sites depend on its latents")
        return trace, given.law

    def _note(self, trace: Trace) -> None:
        completions = {site.name for site in self.program.completions}
        found = site_terms(self.program, trace, self.size, skip=completions)
        terms = {name: self.program.pooled(term) for name, term in found.items()}
        self._check({name: term for name, term in terms.items() if name in self.terms})
        if missing := self.terms.keys() - terms.keys():
            raise ProgramError(f"site {min(missing)!r} is gone: the program's sites depend on its latents")
        self.terms |= terms

    def _check(self, again: dict[str, Tensor]) -> None:
        for name, term in again.items():
            if not torch.allclose(term, self.terms[name], rtol=1e-4, atol=1e-4):
                raise ProgramError(
                    f"site {name!r} has another log-probability since particles were resampled: it depends on other "
                    "particles (a mean over them, a branch on their values), or on randomness outside pyro.sample. "
                    "SMC cannot split such a program; write it so that each particle stands alone"
                )


class _Given(Messenger):
    """Gives latents their values, and stops at the first "completion", or "latent", that has none."""

    def __init__(
        self,
        history: History,
        values: dict[str, Tensor],
        written: dict[str, Written],
        stop: str | None = None,
    ) -> None:
        super().__init__()
        self.law: tuple[str, Autoregressive] | None = None
        self._history = history
        self._program = history.program
        self._values = values
        self._written = written
        self._stop = stop

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        site = self._program.sites.get(name)
        if site is None or site.kind != "latent" or msg["value"] is not None:
            return
        if name in self._values:
            value = self._program.under_plate(name, self._values[name])
            if name in self._written:
                self._know(name, fn, value)
            msg["value"] = value
        elif isinstance(fn, Autoregressive) and self._stop is not None:
            self.law = (name, fn)
            raise _Reached
        elif self._stop == "latent":
            raise _Reached
        elif name in self._history.retained:
            value = fn().detach()
            value[self._history.slots] = self._program.under_plate(name, self._history.retained[name])
            msg["value"] = value

    def _know(self, name: str, fn: Autoregressive, value: Tensor) -> None:
        """Hand the law the scores of what was written under it."""
        was = self._written[name]
        if not same_law(self._program, name, fn):
            ids, mask = _prompts(fn, was.prompt_ids.shape[:-1])
            if not _same_prompts(was.prompt_ids, was.prompt_mask, ids, mask):
                raise ProgramError(
                    f"the prompts of site {name!r} are others since particles were resampled: they depend on more than "
                    "each particle's own latents, and SMC cannot split such a program"
                )
        fn.know(value, self._program.under_plate(name, was.scores))


def _prompts(law: Autoregressive, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and mask (particle, *batch, length) of every completion's prompt."""
    mask = torch.ones_like(law.prompt_ids) if law.prompt_mask is None else law.prompt_mask
    ids, mask = (x.expand(*law.batch_shape, -1).reshape(*shape, -1) for x in (law.prompt_ids, mask))
    return ids, mask


def _same_prompts(ids: Tensor, mask: Tensor, other: Tensor, other_mask: Tensor) -> bool:
    """Whether left-padded prompts agree, whatever their padding."""
    length = max(ids.shape[-1], other.shape[-1])

    def widened(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids.masked_fill(mask == 0, -1), (length - ids.shape[-1], 0), value=-1)

    return torch.equal(widened(ids, mask), widened(other, other_mask))
