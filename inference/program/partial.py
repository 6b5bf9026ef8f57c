"""A program run in parts: to its next completion, with the latents that particles have so far.

Resampling exchanges particles in mid-program, and values that Python has already computed from them are then those of
another particle. So the program is never continued: it is run again from its start, with the latents so far assigned
(no network runs for them), up to the next completion. Terms of the sites before must come out as the resampled
particles carried them; where they do not, the program mixes particles, and cannot be split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive

from .assign import same_distribution
from .errors import ProgramError
from .handlers import PARTICLES, Assign, Assignment, explained
from .independence import check_independence
from .particles import Particles, run_particles, score_sites
from .program import Program
from .sites import prompts_of, same_prompts, sample_sites, site_value


class _Stopped(BaseException):  # which a program's own `except Exception` lets through
    """The program has reached the site at which this part of it ends."""


class Written(NamedTuple):
    """A completion that particles have: log p of its tokens (particle, *batch, token), and the prompts it continues."""

    token_log_prob: Tensor
    prompt_ids: Tensor  # (particle, *batch, length)
    prompt_mask: Tensor


@dataclass
class PartialRun:
    """Particles in mid-program.

    :param size: the number of particles.
    :param retained: by site, values (slot, *batch, *event) that the particles ``slots`` have in the place of draws.
    :param values: the latents so far, (particle, *batch, *event).
    :param written: the completions among them.
    :param terms: of the sites before the next completion, (particle, weight prompt).
    :param whole: the run of all prompts, of some of which this one is (`part`); None if it is itself of all.
    """

    program: Program
    size: int
    retained: dict[str, Tensor]
    slots: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    whole: PartialRun | None = None

    def part(self, first: int, size: int) -> PartialRun:
        """Return the run of ``size`` prompts, from ``first``, whose next completion is written apart, see `join`.

        The program itself runs with all prompts: the others have what they had before (`with_others`).
        """

        def some(name: str, x: Tensor) -> Tensor:
            return x.narrow(self.program.prompt_axis(name), first, size)

        return PartialRun(
            self.program.narrowed(first, size),
            self.size,
            {name: some(name, value) for name, value in self.retained.items()},
            self.slots,
            {name: some(name, value) for name, value in self.values.items()},
            {name: Written(*(some(name, x) for x in old)) for name, old in self.written.items()},
            {name: term.narrow(1, first, size) for name, term in self.terms.items()},
            whole=self,
        )

    def join(self, parts: Sequence[PartialRun]) -> None:
        """Take over what the runs of all prompts (`part`), side by side, have become."""

        def joined(name: str, each: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(each), self.program.prompt_axis(name))

        self.values = {name: joined(name, (part.values[name] for part in parts)) for name in parts[0].values}
        self.terms = {name: torch.cat([part.terms[name] for part in parts], 1) for name in parts[0].terms}
        for name in parts[0].written:
            columns = zip(*(part.written[name] for part in parts), strict=True)
            self.written[name] = Written(*(joined(name, column) for column in columns))

    def with_others(self, name: str, x: Tensor, others: Tensor) -> Tensor:
        """Return a tensor (particle, *batch, ...) of a site, with the prompts that are not of this part.

        :param others: of all prompts; broadcast to the shape.
        """
        if self.whole is None:
            return x
        shape, axis = list(x.shape), self.program.prompt_axis(name)
        shape[axis] = self.whole.program.num_prompts
        found = others.expand(shape).clone()
        self.own(found, axis).copy_(x)
        return found

    def of_own(self, fn: Autoregressive) -> Autoregressive:
        """Return the distribution of this part's completions, from that of all prompts'."""
        if self.whole is None:
            return fn
        assert self.program.prompt_dim is not None
        return fn.narrowed(self.program.prompt_dim, self._first, self.program.num_prompts)

    def own(self, x: Tensor, axis: int) -> Tensor:
        """Return what is of this part's prompts in a tensor of all prompts, which are its ``axis``."""
        if self.whole is None or x.shape[axis] == 1:
            return x
        return x.narrow(axis, self._first, self.program.num_prompts)

    @property
    def _first(self) -> int:
        """The index of its first prompt among those of the whole run."""
        return 0 if self.whole is None else self.program.first - self.whole.program.first

    def select(self, index: Tensor) -> None:
        """Replace the particles by those that ``index`` (particle, weight prompt) names."""
        take = self.program.take
        self.values = {name: take(name, value, index) for name, value in self.values.items()}
        self.terms = {name: term.gather(0, index) for name, term in self.terms.items()}
        for name, old in self.written.items():
            self.written[name] = Written(*(take(name, part, index) for part in old))

    @property
    def likelihood(self) -> dict[str, Tensor]:
        """The terms of factors and observations so far."""
        return {name: term for name, term in self.terms.items() if self.program.sites[name].kind == "observed"}

    @property
    def complete(self) -> bool:
        """Whether every completion is written."""
        return all(site.name in self.values for site in self.program.completions)

    def advance(self) -> tuple[str, Autoregressive]:
        """Run to the next completion and return its site's name and distribution.

        Latents before it are drawn from the prior, and new terms are added to ``terms``.

        :raises ProgramError: if an earlier term has changed.
        """
        check_independence(self.program)
        trace, reached = self._run(self.values, stop="completion")
        self._add_terms(trace)
        for name, node in sample_sites(trace):
            site = self.program.sites[name]
            if site.kind == "latent" and name not in self.values:
                self.values[name] = site_value(site, node["value"], self.size)
        if reached is None:
            missing = [site.name for site in self.program.completions if site.name not in self.values]
            raise ProgramError(f"site {missing[0]!r} is gone: the program's sites depend on its latents")
        return reached

    def begin(self, name: str, fn: Autoregressive) -> None:
        """Record the prompts of a completion that is to be written."""
        ids, mask = prompts_of(fn, (self.size, *self.program.sites[name].shape[:-1]))
        self.written[name] = Written(torch.zeros_like(ids), ids, mask)

    def write(self, name: str, value: Tensor, token_log_prob: Tensor) -> None:
        """Record the completions of a site and log p of their tokens, both reshaped to (particle, *batch, token)."""
        shape = (self.size, *self.program.sites[name].shape)
        self.values[name] = value.reshape(shape)
        self.written[name] = self.written[name]._replace(token_log_prob=token_log_prob.reshape(shape))

    def terms_with(self, values: dict[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """Return the terms (particle, prompt) of the factors and observations that follow, up to the next latent.

        :param values: the latents so far, of any number of particles, with a completion to try.
        :param check: see `score_sites`.
        """
        if self.whole is not None:  # which has all prompts: those that are not of this part do not matter
            before, repeats = self.whole.values, len(next(iter(values.values()))) // self.size
            others = {name: value.repeat_interleave(repeats, 0) for name, value in before.items()}
            others |= {name: self.whole.program.sites[name].value for name in values if name not in others}
            every = {name: self.with_others(name, value, others[name]) for name, value in values.items()}
            return {name: self.own(term, 1) for name, term in self.whole.terms_with(every, check=check).items()}
        trace, _ = self._run(values, stop="latent")
        skip = {*self.terms, *(site.name for site in self.program.latents)}
        return score_sites(self.program, trace, len(next(iter(values.values()))), skip=skip, check=check)

    def finish(self) -> Particles:
        """Run the complete program at its latents and return its particles."""
        with Assign(self._assignments(self.values, self.written)):
            particles = run_particles(self.program, None, self.size)
        self._check({name: particles.log_likelihood[name] for name in self.terms if name in particles.log_likelihood})
        return particles

    def _run(self, values: dict[str, Tensor], stop: str) -> tuple[Trace, tuple[str, Autoregressive] | None]:
        """Run to the first "completion", or "latent", without a value; return the trace, and the site there."""
        size = len(next(iter(values.values()))) if values else self.size
        tracer, stopper = poutine.trace(), _Stop(self.program, stop)
        assign = Assign(self._assignments(values, self.written if stop == "completion" else {}, draws=stop != "latent"))
        plate = pyro.plate(PARTICLES, size, dim=-1 - self.program.max_plate_nesting)
        with contextlib.suppress(_Stopped), explained(), torch.no_grad(), tracer, stopper, assign, plate:
            self.program.model(*self.program.args, **self.program.kwargs)
        trace = prune_subsample_sites(tracer.trace)
        for name, _ in sample_sites(trace):
            if name not in self.program.sites:
                raise ProgramError(f"site {name!r} was not there before: the program's sites depend on its latents")
        return trace, stopper.reached

    def _assignments(
        self, values: dict[str, Tensor], written: dict[str, Written], *, draws: bool = True
    ) -> dict[str, Callable[[Any], Assignment]]:
        """Return the assignments of the latents so far and, where the rest is drawn, of retained values among it."""

        def of_value(name: str, value: Tensor) -> Callable[[Any], Assignment]:
            value = self.program.under_plate(name, value)
            return lambda fn: (value, self._known(name, fn) if name in written else None)

        def of_retained(name: str) -> Callable[[Any], Assignment]:
            def assignment(fn: Any) -> Assignment:
                value = fn().detach()
                value[self.slots] = self.program.under_plate(name, self.retained[name])
                return value, None

            return assignment

        assignments = {name: of_value(name, value) for name, value in values.items()}
        others = [site for site in self.program.latents if site.name in self.retained and site.name not in values]
        return assignments | {site.name: of_retained(site.name) for site in others if draws and not site.is_completion}

    def _known(self, name: str, fn: Autoregressive) -> Tensor:
        """Return log p of the tokens of a written completion, under the particle plate.

        :raises ProgramError: if its prompts are no longer those it was written under.
        """
        old = self.written[name]
        if not same_distribution(fn, self.program.sites[name].fn):
            ids, mask = prompts_of(fn, old.prompt_ids.shape[:-1])
            if not same_prompts(old.prompt_ids, old.prompt_mask, ids, mask):
                raise ProgramError(
                    f"the prompts of site {name!r} are others since particles were resampled: they depend on more than "
                    "each particle's own latents, and SMC cannot split such a program"
                )
        return self.program.under_plate(name, old.token_log_prob)

    def _add_terms(self, trace: Trace) -> None:
        completions = {site.name for site in self.program.completions}
        found = score_sites(self.program, trace, self.size, skip=completions)
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


class _Stop(Messenger):
    """Stop the program at its first "completion", or "latent", without a value; ``reached`` is the completion's."""

    def __init__(self, program: Program, at: str) -> None:
        super().__init__()
        self._program, self._at = program, at
        self.reached: tuple[str, Autoregressive] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        site = self._program.sites.get(name)
        if site is None or site.kind != "latent" or msg["value"] is not None:
            return
        if isinstance(fn, Autoregressive):
            self.reached = (name, fn)
            raise _Stopped
        if self._at == "latent":
            raise _Stopped
