r"""Where objectives take their particles from: draws x of some distribution s, with log p(x) + l(x) and log s(x).

The distribution is the guide's own, the prior's, or that of another engine's draws; and particles may be kept and used
again, which costs neither networks nor rewards, but for the guide's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayeslm.inference.program import (
    PARTICLES,
    Assign,
    Assignment,
    Particles,
    Program,
    ProgramError,
    ranks,
    run_particles,
    sample_sites,
    score_sites,
)
from bayeslm.posterior import Posterior
from bayeslm.validation import Count, validated

from .resumable import ANY, check_indices, check_tensor
from .state import EMPTY, State, under, within

BASE = -7046029254386353131  # of the hash that tells particles apart, modulo 2^64; odd
Source = Callable[[Program, Callable[..., Any], int, State], tuple[Particles, State]]
"""``source(program, guide, num_particles, state)`` returns so many particles, whose ``log_proposal`` is log s, and the
next state. Of several processes each returns its own, ``ranks().share(num_particles)`` of them."""


@validated
def of_guide(
    program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
) -> tuple[Particles, State]:
    """Draw from the guide."""
    return _new(program, guide, num_particles), state


@validated
def of_prior(
    program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
) -> tuple[Particles, State]:
    """Draw from the prior."""
    return _new(program, None, num_particles), state


def _new(program: Program, guide: Callable[..., Any] | None, num_particles: int) -> Particles:
    """Draw this process's share of particles."""
    return run_particles(program, guide, ranks().share(num_particles))


@validated
@dataclass(frozen=True)
class FromPosterior:
    """Draws of another engine, picked at random: particles, states of chains, exact draws.

    :param posterior: of the same program and prompts, all of them where these are subsampled; weighted draws come with
        their weights.
    :raises ValueError: if the distribution of its draws is not known: best-of-n's, and those of conditional runs.
    """

    posterior: Posterior

    def __post_init__(self) -> None:
        if self.posterior.kind == "uncorrected" or self.posterior.conditional:
            raise ValueError(
                f"FromPosterior: draws of {self.posterior.engine} have no known distribution, nor have those of a "
                "conditional run: use the draws of another engine"
            )

    def identity(self) -> Mapping[str, Any]:
        """Return a digest of the draws, for checkpoints."""
        log_joint = np.ascontiguousarray(self.posterior.log_joint).tobytes()
        return {"digest": blake2b(log_joint, digest_size=8).hexdigest()}

    def __call__(
        self, program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
    ) -> tuple[Particles, State]:
        """Pick draws at random, with replacement.

        :raises ProgramError: if the posterior is of another program, or of other prompts.
        """
        complete, posterior = program.whole or program, self.posterior
        prompts = 1 if complete.shared else complete.full_size
        names = [site.name for site in complete.latents]
        if any(name not in posterior.samples for name in names) or posterior.log_joint.shape[-1] != prompts:
            raise ProgramError("the draws to learn from are of another program, or of other prompts")
        num = ranks().share(num_particles)
        rows = torch.randint(posterior.log_joint[..., 0].size, (num,), device=program.device).cpu().numpy()
        batch = None if program.minibatch is None else program.minibatch.cpu().numpy()

        def pick(array: np.ndarray, prompt_axis: int | None = 1) -> Tensor:
            some = array.reshape(-1, *array.shape[2:])[rows]
            if batch is not None and prompt_axis is not None:
                some = some.take(batch, axis=prompt_axis)
            return torch.as_tensor(some).to(program.device)

        def value(name: str) -> Tensor:
            dims = complete.sites[name].dims
            return pick(posterior.samples[name], 1 + dims.index("prompt") if "prompt" in dims else None)

        log_likelihood = {name: pick(term).float() for name, term in posterior.log_likelihood.items()}
        likelihood = sum(log_likelihood.values(), torch.zeros((num, 1), device=program.device))
        log_joint = pick(posterior.log_joint).float()
        particles = Particles(
            values={name: value(name) for name in names},
            # not known where the likelihood is 0, and not needed there
            log_prior=torch.where(torch.isneginf(likelihood), 0.0, log_joint - likelihood),
            log_proposal=log_joint - pick(posterior.log_weights).float(),
            log_likelihood=log_likelihood,
            rewards={name: pick(r, None if r.shape[2] == 1 else 1).float() for name, r in posterior.rewards.items()},
            prompts=None if program.minibatch is None else program.minibatch.expand(num, -1),
        )
        return particles, state


@validated
@dataclass(frozen=True)
class Replay:
    """Draws of the guide that are kept: every few steps all are new, and in between they come from a buffer.

    (New ones at once, rather than a few in each step: writing many completions takes hardly longer than writing few.)
    Between two lots of new draws the buffer is picked from without replacement: none a second time before all have
    had their turn, in an order that each lot shuffles anew.
    Where prompts are subsampled, a kept minibatch is used again with its draws, picked at random.

    Each process of a run keeps the draws that it has made. A checkpoint has those of all, and is resumed by any number
    of processes; but one that is written because a step has failed or was interrupted has the first process's alone.

    :param capacity: draws that are kept, the newest, in whole lots; of less than a lot, so many of the newest.
    :param every: steps from one lot of new draws to the next.
    :raises ValueError: if a setting is below 1.
    """

    capacity: Count = 4096
    every: Count = 4

    def __call__(
        self, program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
    ) -> tuple[Particles, State]:
        """Return new draws, or kept ones.

        The state holds the buffer as ``kept``, of each of its draws the ``lot``, which is the step that made it, the
        rows in the order of their ``turns``, and ``step``, the steps done.
        """
        step = int(state.get("step", 0))
        kept, lots = within("kept", state), state.get("lot", torch.empty(0, dtype=torch.long)).cpu()
        done = {"step": torch.tensor(step + 1)}
        if self.repeats(state):
            buffer = Particles.from_tensors(kept)
            num = ranks().share(num_particles)
            if buffer.prompts is None:
                rows, turns = _next_rows(len(buffer), state["turns"].to(buffer.log_prior.device), num)
            else:
                rows, turns = _of_a_minibatch(lots, num).to(buffer.log_prior.device), state["turns"]
            return buffer[rows], {**under("kept", kept), "lot": lots, **done, "turns": turns}
        new = _new(program, guide, num_particles)
        # log-probabilities of tokens would be those of the guide before it moves
        parts = [replace(new, token_log_prob={}, proposal_token_log_prob={}, pointwise={})]
        buffer = Particles.concatenate([*([Particles.from_tensors(kept)] if kept else []), *parts])
        lots = torch.cat([lots, torch.full((len(new),), step)])
        newest = self._newest(lots, num_particles)
        tensors = under("kept", buffer[newest].as_tensors())
        return new, {**tensors, "lot": lots[newest], **done, "turns": torch.empty(0, dtype=torch.long)}

    def _newest(self, lots: Tensor, num_particles: int) -> slice:
        """Return the rows of the draws that stay: whole lots, the same ones on each process."""
        if self.capacity < num_particles:
            return slice(-max(1, min(ranks().share(self.capacity), ranks().share(num_particles))), None)
        oldest = lots.unique()[-(self.capacity // num_particles) :][0]
        return slice(int((lots < oldest).sum()), None)

    def gathered(self, state: State) -> State:
        """Return the state with the draws of all processes, lot by lot; on the first process, which writes it."""
        if ranks().size == 1 or not state:
            return state
        names = [name for name in state if name != "step"]
        sent = ranks().exchange(None, {name: state[name] for name in names}, may_stop=False)
        if not ranks().is_first:
            return state
        every = [message.tensors for message in sent]
        begins = np.cumsum([0, *(len(each["lot"]) for each in every)])
        turns = torch.cat([each["turns"].cpu() + int(begin) for each, begin in zip(every, begins, strict=False)])
        lots, order = torch.cat([each["lot"] for each in every]).sort(stable=True)
        kept = [within("kept", each) for each in every]
        found = {name: torch.cat([each[name] for each in kept])[order] for name in kept[0]}
        return {**under("kept", found), "lot": lots, "step": state["step"], "turns": order.argsort()[turns]}

    def divided(self, state: State) -> State:
        """Return the state with this process's part of each lot.

        Of a lot with fewer draws than processes, as one process has written it alone, some processes get the same draw.
        """
        run = ranks()
        if run.size == 1 or not state:
            return state
        lots = state["lot"].cpu()
        parts = [(lots == lot).nonzero().squeeze(-1) for lot in lots.unique()]
        rows = torch.cat([part[run.rank % len(part) :: run.size] for part in parts])
        place = torch.full((len(lots),), -1).scatter_(0, rows, torch.arange(len(rows)))
        turns = place[state["turns"].cpu()]
        found = {name: x[rows] for name, x in within("kept", state).items()}
        return {**under("kept", found), "lot": lots[rows], "step": state["step"], "turns": turns[turns >= 0]}

    def check_state(self, state: State, program: Program, steps: int) -> None:
        """Check a state that is read from a checkpoint; see `Objective.check_state`."""
        if not steps and not state:
            return
        kept = within("kept", state)
        check_tensor("kept.log_prior", kept.get("log_prior"), (ANY, ANY), finite=False)
        num = len(kept["log_prior"])
        if num == 0:
            raise ValueError("kept has no draws")
        check_tensor("step", state.get("step"), (), whole=True)
        if int(state["step"]) != steps:
            raise ValueError(f"the buffer has {int(state['step'])} steps, and the training {steps}")
        check_tensor("lot", state.get("lot"), (num,), whole=True)
        check_indices("lot", state["lot"], steps)
        if (state["lot"].diff() < 0).any():
            raise ValueError("lot is not in order")
        check_indices("turns", state.get("turns"), num)
        if len(state["turns"].unique()) < len(state["turns"]):
            raise ValueError("turns holds a draw twice")
        for site in program.latents:
            name = f"values.{site.name}"
            like = site.value if site.value.is_floating_point() else None
            whole = site.value.dtype == torch.int64
            check_tensor(f"kept.{name}", kept.get(name), (num, *site.shape), like=like, whole=whole)
        for name, x in kept.items():
            if x.dim() == 0 or len(x) != num:
                raise ValueError(f"kept.{name} has the shape {tuple(x.shape)}, and there are {num} draws")
        scores = [f"log_likelihood.{site.name}" for site in program.sites.values() if site.kind == "observed"]
        scores += ["log_proposal", *(f"rewards.{name}" for name, _ in program.rewards)]
        for name in scores:
            check_tensor(f"kept.{name}", kept.get(name), (num, ANY), finite=False)

    def repeats(self, state: State) -> bool:
        """Return whether the next particles are kept ones."""
        return "step" in state and int(state["step"]) % self.every != 0


def _next_rows(size: int, turns: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the next rows of a buffer of a size, and the turns after them."""
    while len(turns) < num:
        turns = torch.cat([turns, torch.randperm(size, device=turns.device)])
    return turns[:num], turns[num:]


def _of_a_minibatch(lots: Tensor, num: int) -> Tensor:
    """Return rows of one lot, whose prompts are one minibatch, picked at random: the same lot on all processes."""
    each = lots.unique()
    lot = each[ranks().agreed(torch.randint(len(each), ()))]
    together = (lots == lot).nonzero().squeeze(-1)
    return together.repeat(-(-num // len(together)))[-num:]


def log_q(program: Program, guide: Callable[..., Any], particles: Particles) -> Tensor:
    """Return log q (particle, weight prompt) of particles under a guide, with gradient. Equal ones are scored once.

    :raises ProgramError: if the guide has auxiliary sites, as AutoNormal does, and has not drawn the particles.
    """
    values = {site.name: particles.values[site.name] for site in program.latents} | particles.auxiliary
    which, some = _distinct(values)
    trace, n = guide_trace(program, guide, particles[some])
    zero = torch.zeros((n, program.weight_prompts), device=program.device)
    return sum((program.pooled(term) for term in score_sites(program, trace, n).values()), zero)[which]


def guide_trace(program: Program, guide: Callable[..., Any], particles: Particles) -> tuple[Trace, int]:
    """Return the trace of a guide whose sites have the particles' values, and the number of particles.

    :raises ProgramError: if the guide has auxiliary sites, as AutoNormal does, and has not drawn the particles.
    """
    determined = getattr(guide, "determined", ()) if particles.auxiliary else ()  # which rounding could contradict
    names = [site.name for site in program.latents if site.name not in determined]
    values = {name: particles.values[name] for name in names} | particles.auxiliary

    def assignment(name: str) -> Callable[[Any], Assignment]:
        if name in particles.auxiliary:
            return lambda fn: (values[name], None)
        known = particles.proposal_token_log_prob.get(name)
        scores = None if known is None else program.under_plate(name, known)
        return lambda fn: (program.under_plate(name, values[name]), scores)

    assign, n = Assign({name: assignment(name) for name in values}), len(particles)
    with assign, pyro.plate(PARTICLES, n, dim=-1 - program.max_plate_nesting):
        trace = poutine.trace(program.pinned(guide)).get_trace(*program.args, **program.kwargs)
    trace = poutine.util.prune_subsample_sites(trace)
    if unknown := [name for name, _ in sample_sites(trace) if name not in values and name not in determined]:
        raise ProgramError(
            f"the guide samples {unknown[0]!r}, which the draws to learn from do not have: learn from its own draws"
        )
    return trace, n


def _distinct(values: dict[str, Tensor]) -> tuple[Tensor | slice, Tensor | slice]:
    """Which of the distinct draws each is, and the rows of these.

    (By hashes, and a look whether they tell the truth: `torch.unique` of rows compares these one by one.)
    """
    draws = torch.cat([_numbers(value) for value in values.values()], -1)
    powers = torch.full(draws.shape[-1:], BASE, device=draws.device).cumprod(0)
    hashes, which = torch.unique((draws * powers).sum(-1), return_inverse=True)
    some = which.new_zeros(len(hashes)).scatter_(0, which, torch.arange(len(which), device=which.device))
    if len(hashes) == len(which) or not torch.equal(draws[some[which]], draws):
        return slice(None), slice(None)
    return which, some


def _numbers(value: Tensor) -> Tensor:
    """A value (particle, ...) as integers (particle, number) that tell it from others."""
    if value.is_floating_point():
        value = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
    return value.long().reshape(len(value), -1)
