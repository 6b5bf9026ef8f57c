"""Weighted particles in mid-program, in independent chains: their weights, their resampling and their genealogy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import (
    EvidenceError,
    PartialRun,
    Particles,
    Program,
    ProgramError,
    prompt_labels,
    to_numpy,
)
from bayeslm.models.lm import Autoregressive, Decoder
from bayeslm.validation import validated

from .branching import keep
from .resampling import RESAMPLING, Resampling, conditional_multinomial, ess, keep_in_place, systematic


@runtime_checkable
class ParticleSettings(Protocol):
    """The settings that engines of resampled particles share."""

    @property
    def num_particles(self) -> int: ...
    @property
    def num_chains(self) -> int: ...
    @property
    def resampling(self) -> Resampling | Literal["optimal"]: ...
    @property
    def ess_threshold(self) -> float: ...


class WeightUpdate(NamedTuple):
    """A change of the weights, as error messages need it.

    ``step`` names the step of the engine. ``parts`` are the terms of the change (row,) by name, one of which is NaN or
    +inf where a weight is. ``factors`` are terms of the program (particle, prompt) by site, one of which is -inf where
    a particle dies. ``texts`` are a completion's distribution and its texts with the step's token, if it wrote one.
    ``explain`` raises the error of a factor that is NaN or +inf, where they have not been checked.
    """

    step: str
    parts: dict[str, Tensor]
    factors: dict[str, Tensor]
    texts: tuple[Autoregressive, Decoder] | None = None
    explain: Callable[[], Any] | None = None


class RetainedRows(NamedTuple):
    """Completions that are retained: the indices of their rows (row,), and their tokens (row, token)."""

    rows: Tensor
    values: Tensor


class ResamplingRecord(NamedTuple):
    """One step of resampling; fields are named as in an engine's ``stats``.

    ``ess_by_step`` (chain, prompt) is the effective sample size before the step, ``resampled`` (chain, prompt) whether
    the chain was resampled, ``ancestors`` (chain, particle, prompt) the index of each particle's ancestor in its chain.
    """

    ess_by_step: Tensor
    resampled: Tensor
    ancestors: Tensor


@validated
class Population:
    """Weighted particles of one or more independent chains, each resampled within itself.

    The particles are one axis, chain by chain. The prompt axis has length 1 where prompts share a latent.
    ``log_weights`` (particle, prompt) are the log-weights since the last resampling, ``log_z`` (chain, prompt) is the
    estimate of log Z up to it, and ``roots`` (particle, prompt) is the index of each particle's first ancestor in its
    chain.

    :param program: the inspected program.
    :param settings: the engine; each chain has ``settings.num_particles`` particles.
    :param chains: the number of chains in this population; None for ``settings.num_chains``, that is for all of them.
    :param group: which particles of a chain are in it, where these are resampled in groups; None for all of them.
    :param lost: the number of each chain's other particles, where all of these have weight 0.
    :param retained: values of the latents (chain, *batch, *event) by site, which particle 0 of each chain has from the
        beginning to the end: conditional SMC, with multinomial resampling.
    """

    def __init__(
        self,
        program: Program,
        settings: ParticleSettings,
        *,
        chains: int | None = None,
        group: range | None = None,
        lost: int = 0,
        retained: dict[str, Tensor] | None = None,
    ) -> None:
        self.chains = settings.num_chains if chains is None else chains
        group = range(settings.num_particles) if group is None else group
        self.size, self._start = len(group), group.start
        device, total, prompts = program.device, self.chains * self.size, program.weight_prompts
        first = torch.arange(self.chains, device=device) * self.size
        self.partial_run = PartialRun(program, total, retained=retained or {}, slots=first)
        self.log_weights = torch.zeros((total, prompts), device=device)
        self.log_z = torch.zeros((self.chains, prompts), device=device)
        own = torch.arange(group.start, group.stop, device=device)
        self.roots = own.repeat(self.chains)[:, None].repeat(1, prompts)
        # where particles branch, they are not resampled
        scheme = systematic if settings.resampling == "optimal" else RESAMPLING[settings.resampling]
        self._resample: Callable[[Tensor], Tensor] = conditional_multinomial if retained else scheme
        self._threshold = settings.ess_threshold * self.size
        self._others_lost = lost
        self._is_all = self.chains == settings.num_chains and self.size + lost == settings.num_particles
        self._counted: set[str] = set()
        self._identity = torch.arange(self.size, device=device)[None, :, None].expand(self.chains, -1, prompts)
        self._records: list[ResamplingRecord] = []
        self._next: tuple[Tensor, Tensor, bool] | None = None  # the ESS, where it is low, and whether it is anywhere

    @property
    def total_log_weights(self) -> Tensor:
        """Log-weights (particle, prompt) since the beginning; the mean weight of a chain is its estimate of Z."""
        return self.log_weights + self.log_z.repeat_interleave(self.size, 0)

    def parts(self, size: int) -> list[Population]:
        """Return the particles of at most ``size`` prompts each, to be written apart (see `join`); or this alone.

        Prompts that are one posterior are not divided.
        """
        prompts = self.partial_run.program.num_prompts
        if size >= prompts or self.partial_run.program.shared:
            return [self]
        found = []
        for columns in torch.arange(prompts).tensor_split(-(-prompts // size)):
            first, number = int(columns[0]), len(columns)
            part = copy.copy(self)
            part.partial_run = self.partial_run.part(first, number)
            for name in ("log_weights", "log_z", "roots", "_identity"):
                setattr(part, name, getattr(self, name).narrow(-1, first, number))
            part._records, part._next = [], None
            found.append(part)
        return found

    def join(self, parts: Sequence[Population]) -> None:
        """Take over what `parts` have become, after equally many steps."""
        if parts[0] is self:
            return
        self.partial_run.join([part.partial_run for part in parts])
        for name in ("log_weights", "log_z", "roots"):
            setattr(self, name, torch.cat([getattr(part, name) for part in parts], -1))
        for step in zip(*(part._records for part in parts), strict=True):
            self._records.append(ResamplingRecord(*(torch.cat(each, -1) for each in zip(*step, strict=True))))
        self._next = None

    def weigh(self, increment: Tensor, update: WeightUpdate) -> None:
        """Add to the log-weights. A particle of weight 0 keeps it.

        :param increment: the change of the log-weights, (particle, prompt).
        :param update: the origin of the change, for error messages.
        :raises ProgramError: if a new log-weight is NaN or +inf.
        :raises EvidenceError: if all particles of a prompt have weight 0, and there are no other chains.
        """
        dead = self.log_weights == -torch.inf
        weights = torch.where(dead, -torch.inf, self.log_weights + increment)
        extinct = (weights == -torch.inf).all(0)
        invalid = weights.isnan() | (weights == torch.inf)
        unchecked = [] if update.explain is None else list(update.factors.values())
        found = [invalid.any(), extinct.any(), *((term.isnan() | (term == torch.inf)).any() for term in unchecked)]
        before, low = self._low(weights)
        # the host waits for the device here, once, for all that it needs to know until the next token
        is_low, is_invalid, is_extinct, *is_wrong = torch.stack([low.any(), *found]).tolist()
        if any(is_wrong) and update.explain is not None:
            update.explain()
        if is_invalid:
            raise self._invalid_weight(update, invalid)
        if is_extinct and self._is_all:
            raise self._extinction(update, int(extinct.long().argmax()))
        self.log_weights, self._next = weights, (before, low, is_low)

    def _low(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the effective sample size of log-weights (particle, prompt), and where it is too low.

        Both are (chain, prompt).
        """
        before = ess(log_weights.reshape(self.chains, self.size, -1))
        return before, (before < self._threshold) & (before > 0)

    def weigh_terms(self, terms: dict[str, Tensor], step: str) -> None:
        """Add the terms (particle, prompt) of those factors and observations that are not yet part of the weights.

        :param terms: by site; sites of earlier calls are skipped.
        :param step: the name of the step, for error messages.
        """
        new = {site: term for site, term in terms.items() if site not in self._counted}
        self._counted |= new.keys()
        if new:
            self.weigh(sum(new.values(), torch.zeros_like(self.log_weights)), WeightUpdate(step, {}, new))

    def resample(self) -> Tensor | None:
        """Resample chains whose effective sample size is below the threshold, and record the step.

        :returns: the index of each particle's ancestor among all particles, (particle, prompt); None if no chain was
            resampled.
        """
        weights = self.log_weights.reshape(self.chains, self.size, -1)
        if self._next is None:
            before, low = self._low(self.log_weights)
            self._next = before, low, bool(low.any())
        (before, low, is_low), self._next = self._next, None
        if not is_low:
            self._records.append(ResamplingRecord(before, low, self._identity))
            return None
        ancestors = torch.where(low[:, None], keep_in_place(self._resample(weights)), self._identity)
        self._records.append(ResamplingRecord(before, low, ancestors))
        mean = weights.logsumexp(1) - np.log(self.size)
        self.log_z = self.log_z + torch.where(low, mean, 0.0)
        self.log_weights = torch.where(low[:, None], 0.0, weights).reshape(self.log_weights.shape)
        return self._select(ancestors)

    def branch(self, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the particles by those of their texts with one token more that are kept (`branching`).

        :param log_q: of the next token, (particle, prompt, token).
        :returns: the index of each particle's ancestor among all particles, and its token, both (particle, prompt).
        """
        weights = self.log_weights.reshape(self.chains, self.size, -1)
        children = (weights[..., None] + log_q.reshape(*weights.shape, -1)).movedim(3, 2).flatten(1, 2)
        kept, log_weights = keep(children, self.size)
        parents = kept // log_q.shape[-1]
        ancestors = keep_in_place(parents)
        to, of = ancestors.argsort(dim=1, stable=True), parents.argsort(dim=1, stable=True)
        token, log_weights = (x.scatter(1, to, x.gather(1, of)) for x in (kept % log_q.shape[-1], log_weights))
        self._records.append(
            ResamplingRecord(ess(weights), torch.ones_like(ancestors[:, 0], dtype=torch.bool), ancestors)
        )
        self.log_weights, self._next = log_weights.reshape(self.log_weights.shape), None
        return self._select(ancestors), token.reshape(self.log_weights.shape)

    def _select(self, ancestors: Tensor) -> Tensor:
        """Replace the particles by ancestors (chain, particle, prompt), and return their indices among all of them."""
        first = torch.arange(self.chains, device=ancestors.device)[:, None, None] * self.size
        index = (ancestors + first).reshape(self.log_weights.shape)
        self.roots = self.roots.gather(0, index)
        self.partial_run.select(index)
        return index

    def merge(self) -> None:
        """Give the weight of all particles of a chain, which are alike, to the first of them."""
        weights = self.log_weights.reshape(self.chains, self.size, -1)
        merged = torch.full_like(weights, -torch.inf)
        merged[:, 0] = weights.logsumexp(1)
        self.log_weights = merged.reshape(self.log_weights.shape)

    def record_without_resampling(self, steps: int) -> None:
        """Record steps at which no chain is resampled."""
        now = ess(self.log_weights.reshape(self.chains, self.size, -1))
        self._records += [ResamplingRecord(now, torch.zeros_like(now, dtype=torch.bool), self._identity)] * steps

    def retained_rows(self, name: str) -> RetainedRows | None:
        """Return the retained completions of a site, or None if the run retains none."""
        if name not in self.partial_run.retained:
            return None
        values = self.partial_run.retained[name]
        each = values.shape[1:-1].numel()
        rows = self.partial_run.slots[:, None] * each + torch.arange(each, device=values.device)
        return RetainedRows(rows.reshape(-1), values.reshape(-1, values.shape[-1]))

    def finish(self) -> Particles:
        """Run the program to its end, add the terms that the weights lack, and return the particles."""
        particles = self.partial_run.finish()
        try:
            self.weigh_terms(particles.log_likelihood, "the end of the program")
        except EvidenceError as error:
            if (unfinished := self._unfinished(particles)) is not None:
                error.add_note(unfinished)
            raise
        return particles

    @staticmethod
    def stats(populations: Sequence[Population], groups: int = 1) -> dict[str, Any]:
        """Return the records of all steps, by the names of `ResamplingRecord`, with the axes (chain, step, ...).

        :param populations: the populations of a run, whose chains are joined; all have equally many steps.
        :param groups: so many of them, one after another, are one chain, whose effective sample size is their sum.
        """
        if not populations[0]._records:
            return {}

        def of_chains(those: Sequence[Population]) -> list[Tensor]:
            records = [[torch.stack(x, 1) for x in zip(*one._records, strict=True)] for one in those]
            ess_by_step, resampled, ancestors = zip(*records, strict=True)
            every = [x + one._start for x, one in zip(ancestors, those, strict=True)]
            return [torch.stack(ess_by_step).sum(0), torch.stack(resampled).any(0), torch.cat(every, 2)]

        chains = [of_chains(populations[i : i + groups]) for i in range(0, len(populations), groups)]
        joined = [to_numpy(torch.cat(each)) for each in zip(*chains, strict=True)]
        return dict(zip(ResamplingRecord._fields, joined, strict=True))

    def _invalid_weight(self, update: WeightUpdate, invalid: Tensor) -> ProgramError:
        """Return the error of a weight that is NaN or +inf, ``invalid`` (particle, prompt) saying where."""
        names = [name for name, part in update.parts.items() if bool((part.isnan() | (part == torch.inf)).any())]
        return ProgramError(
            f"{' and '.join(names) or 'the weight'} is NaN or +inf at {update.step}, for "
            f"{int(invalid.any(1).sum())} of {len(invalid)} particles"
        )

    def _extinction(self, update: WeightUpdate, column: int) -> EvidenceError:
        """Return the error of a prompt of which no particle is left: the step, the factors, and the last texts."""
        program = self.partial_run.program
        causes = [name for name, term in update.factors.items() if bool((term[:, column] == -torch.inf).any())]
        label = "" if program.shared else repr(prompt_labels(program)[column])
        prompt = "" if program.shared else f" of prompt {program.global_index(column)} ({label})"
        because = f": {' and '.join(map(repr, causes))} is -inf for the last of them" if causes else ""
        total = len(self.log_weights) + self.chains * self._others_lost
        error = EvidenceError(f"all {total} particles{prompt} have weight 0 at {update.step}{because}")
        if update.texts is not None and update.texts[0].has_text:
            distribution, decoder = update.texts
            rows = torch.arange(len(decoder.values), device=decoder.values.device).reshape(distribution.batch_shape)
            alive = (self.log_weights != -torch.inf)[:, column]
            if not program.shared and program.prompt_dim is not None:
                rows = rows.movedim(program.prompt_dim, 1)[:, column]
            before = decoder.values.clone()
            before[:, decoder.t - 1] = distribution.vocabulary.pad_token_id
            texts = distribution.decode(before.reshape(*distribution.batch_shape, -1)).reshape(-1)
            error.survivors = tuple(map(str, texts[rows[alive].reshape(-1).cpu()]))
            shown = ", ".join(map(repr, error.survivors[:3]))
            error.add_note(f"texts that were left until then ({len(error.survivors)}): {shown}")
        error.add_note("use more particles, a softer constraint, or a twist or a proposal that anticipates it")
        return error

    def _unfinished(self, particles: Particles) -> str | None:
        """Return a sentence if all texts of a completion, of particles that are left, were cut at their limit."""
        left = (self.log_weights != -torch.inf).any(1)
        for site in self.partial_run.program.completions:
            if bool(left.any()) and bool(site.fn.truncated(particles.values[site.name])[left].all()):
                limit = site.fn.max_new_tokens
                return f"no text of {site.name!r} had ended after {limit} tokens: raise max_new_tokens ({limit})"
        return None


@validated
def groups_of(program: Program, particles: range, *, retains: bool) -> tuple[list[range], int]:
    """Return the groups in which a chain's particles are resampled, and of how many prompts, in bounded memory.

    :param retains: whether the first group has a retained particle, which is in any group by its share.
    """
    rows = [(fn.max_rows, fn.batch_shape.numel()) for fn in (site.fn for site in program.completions)]
    if not rows:
        return [particles], program.num_prompts
    each = 1 if program.shared else program.num_prompts  # prompts that are one posterior are resampled together
    fit = min(most // max(1, number // each) for most, number in rows)
    some = torch.arange(len(particles)).tensor_split(-(-len(particles) // max(1, fit)))
    sizes = [len(group) for group in some]
    if retains and sizes[-1] < sizes[0]:
        sizes.insert(0, sizes.pop(int(torch.multinomial(torch.tensor(sizes, dtype=torch.float64), 1))))
    ends = list(itertools.accumulate(sizes))
    return [particles[end - size : end] for size, end in zip(sizes, ends, strict=True)], max(1, fit // max(sizes))
