"""Islands of particles in mid-program: their weights, when they are resampled, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

from .resampling import RESAMPLING, conditional_multinomial, ess, keep_in_place


class Step(NamedTuple):
    """What a step of writing adds to the weights: its name, and the parts to blame if it is no number or all die."""

    name: str
    parts: dict[str, Tensor]  # log psi, log q: NaN is theirs
    factors: dict[str, Tensor]  # the program's terms (particle, weight prompt): -inf is theirs
    texts: tuple[Autoregressive, Decoder] | None  # with this step's token, and their distribution


class Kept(NamedTuple):
    """Completions that are retained: their rows, and their tokens (row, token)."""

    rows: Tensor
    values: Tensor


class Seen(NamedTuple):
    """A step of resampling, as ``stats`` calls its parts: (chain, weight prompt), and ancestors (chain, particle,
    weight prompt)."""

    ess_by_step: Tensor  # before it
    resampled: Tensor
    ancestors: Tensor


class Islands:
    """``chains`` islands of ``size`` particles each, chain-major in one axis, resampled each within itself.

    ``log_weights`` (particle, weight prompt) since the last resampling, ``log_z`` (chain, weight prompt) up to it,
    ``roots`` (particle, weight prompt): the slot of each one's first ancestor in its island.

    :param alone: no other islands are to come: if all of these die, there is no posterior.
    :param retained: by site (chain, *batch, *event), what slot 0 of each island holds throughout.
    """

    def __init__(
        self,
        program: Program,
        chains: int,
        size: int,
        *,
        scheme: str,
        threshold: float,
        alone: bool,
        retained: dict[str, Tensor] | None = None,
    ) -> None:
        self.chains = chains
        self.size = size
        device = program.device
        slots = torch.arange(chains, device=device) * size
        self.history = PartialRun(program, chains * size, retained=retained or {}, slots=slots)
        self.log_weights = torch.zeros((chains * size, program.weight_prompts), device=device)
        self.log_z = torch.zeros((chains, program.weight_prompts), device=device)
        self.roots = torch.arange(size, device=device).repeat(chains)[:, None].repeat(1, program.weight_prompts)
        self._resample: Callable[[Tensor], Tensor] = conditional_multinomial if retained else RESAMPLING[scheme]
        self._threshold = threshold * size
        self._alone = alone
        self._counted: set[str] = set()
        self._own = torch.arange(size, device=device)[None, :, None].expand(chains, -1, program.weight_prompts)
        self._seen: list[Seen] = []

    @property
    def total(self) -> Tensor:
        """Weights (particle, weight prompt) whose mean over an island is its estimate of Z."""
        return self.log_weights + self.log_z.repeat_interleave(self.size, 0)

    def weigh(self, increment: Tensor, step: Step) -> None:
        """Add to the weights (particle, weight prompt). What is dead stays dead.

        :raises ProgramError: if the sum is NaN or +inf.
        :raises EvidenceError: if all particles of a prompt are dead now.
        """
        dead = self.log_weights == -torch.inf
        weights = torch.where(dead, -torch.inf, self.log_weights + increment)
        extinct = (weights == -torch.inf).all(0)
        invalid = weights.isnan() | (weights == torch.inf)
        if bool(invalid.any() | extinct.any()):
            if bool(invalid.any()):
                self._blame(step, invalid)
            if self._alone:
                self._bury(step, int(extinct.long().argmax()))
        self.log_weights = weights

    def weigh_terms(self, terms: dict[str, Tensor], name: str) -> None:
        """Add those terms (particle, weight prompt) of factors and observations that are not yet in the weights."""
        new = {site: term for site, term in terms.items() if site not in self._counted}
        self._counted |= new.keys()
        if new:
            self.weigh(sum(new.values(), torch.zeros_like(self.log_weights)), Step(name, {}, new, None))

    def resample(self) -> Tensor | None:
        """Ancestors (particle, weight prompt) by their place among all particles; None if nobody moves."""
        weights = self.log_weights.reshape(self.chains, self.size, -1)
        now = ess(weights)
        need = (now < self._threshold) & (now > 0)
        if not bool(need.any()):
            self._seen.append(Seen(now, need, self._own))
            return None
        ancestors = torch.where(need[:, None], keep_in_place(self._resample(weights)), self._own)
        self._seen.append(Seen(now, need, ancestors))
        mean = weights.logsumexp(1) - np.log(self.size)
        self.log_z = self.log_z + torch.where(need, mean, 0.0)
        self.log_weights = torch.where(need[:, None], 0.0, weights).reshape(self.log_weights.shape)
        first = torch.arange(self.chains, device=ancestors.device)[:, None, None] * self.size
        index = (ancestors + first).reshape(self.log_weights.shape)
        self.roots = self.roots.gather(0, index)
        self.history.select(index)
        return index

    def idle(self, steps: int) -> None:
        """Note steps at which no one is resampled."""
        now = ess(self.log_weights.reshape(self.chains, self.size, -1))
        self._seen += [Seen(now, torch.zeros_like(now, dtype=torch.bool), self._own)] * steps

    def kept(self, name: str) -> Kept | None:
        """Where the completions of a site are retained."""
        if name not in self.history.retained:
            return None
        values = self.history.retained[name]
        each = values.shape[1:-1].numel()
        rows = self.history.slots[:, None] * each + torch.arange(each, device=values.device)
        return Kept(rows.reshape(-1), values.reshape(-1, values.shape[-1]))

    def finish(self) -> Particles:
        """Run the program to its end, and weigh by what was not yet weighed."""
        particles = self.history.finish()
        self.weigh_terms(particles.log_likelihood, "the end of the program")
        return particles

    @staticmethod
    def record(groups: Sequence[Islands]) -> dict[str, Any]:
        """The histories of all islands, as ``stats``."""
        if not groups[0]._seen:
            return {}

        def together(name: str) -> np.ndarray:
            each = [torch.stack([getattr(seen, name) for seen in islands._seen], 1) for islands in groups]
            return to_numpy(torch.cat(each))

        return {name: together(name) for name in Seen._fields}

    def _blame(self, step: Step, invalid: Tensor) -> None:
        what = [name for name, part in step.parts.items() if bool((part.isnan() | (part == torch.inf)).any())]
        raise ProgramError(
            f"{' and '.join(what) or 'the weight'} is NaN or +inf at {step.name}, for {int(invalid.any(1).sum())} of "
            f"{len(invalid)} particles"
        )

    def _bury(self, step: Step, column: int) -> None:
        """:raises EvidenceError: that tells where the particles of a prompt died, of what, and what was alive."""
        program = self.history.program
        causes = [name for name, term in step.factors.items() if bool((term[:, column] == -torch.inf).any())]
        of = "" if program.shared else f" of prompt {column} ({prompt_labels(program)[column]!r})"
        because = f": {' and '.join(map(repr, causes))} is -inf for the last of them" if causes else ""
        error = EvidenceError(f"all {len(self.log_weights)} particles{of} are dead at {step.name}{because}")
        if step.texts is not None and step.texts[0].has_text:
            law, steps = step.texts
            rows = torch.arange(len(steps.values), device=steps.values.device).reshape(law.batch_shape)
            alive = (self.log_weights != -torch.inf)[:, column]
            if not program.shared and program.prompt_dim is not None:
                rows = rows.movedim(program.prompt_dim, 1)[:, column]
            before = steps.values.clone()
            before[:, steps.t - 1] = law.vocabulary.pad_token_id
            texts = [str(text) for text in law.decode(before[rows[alive].reshape(-1)])]
            error.survivors = tuple(texts)
            shown = ", ".join(repr(text) for text in texts[:3])
            error.add_note(f"alive until then ({len(texts)}, kept in this error's .survivors): {shown}")
        error.add_note("use more particles, a softer constraint, or a twist or proposal that knows of it")
        raise error
