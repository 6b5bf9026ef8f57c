r"""Adaptive multiple importance sampling: rounds of draws, and steps of training between them.

    round 0    draws of the prior p
    round t    steps of the policy q on the draws so far, then draws of \alpha p + (1 - \alpha) q_t

Cornuet, Marin, Mira and Robert 2012, arXiv 0907.1254; the weights are those of `proposals`. A step minimises the
log-variance divergence over draws that are there already (`LogVariance`), in a trust region: it needs no new texts.
Rounds are small while the policy learns, for at most half of all draws. After it each has as many draws as all before,
of the last policy: these are most of the draws, and no other policy's scores are needed for their weights.

No policy is trained where the prior's draws are good enough: one that draws n texts costs the tokens of several n.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayeslm.inference.program import (
    Particles,
    Program,
    SoFar,
    Stopwatch,
    draw,
    keeping,
    of_prompts,
    posterior,
    to_numpy,
)
from bayeslm.models.lm import LanguageModel
from bayeslm.posterior import Posterior
from bayeslm.progress import Report, track
from bayeslm.reliability import FEW_HITS, LARGE_SHARE
from bayeslm.validation import show, validated
from bayeslm.weights import KHAT_LIMIT, Array, Estimate, ess, psis

from .auto_policy import AutoPolicy
from .budget import Budget
from .callbacks import Reply
from .divergences import LogVariance
from .history import stack_chains
from .loop import Training
from .proposals import ProposalDraws, stratified_log_evidence
from .state import State
from .trust_region import TrustRegion

STEPS = 4  # of training between two rounds, on new draws first
NEWEST = 1024  # draws of each prompt that teach
BATCH = 64  # draws of each prompt in a step
DEAD = 5.0  # nats: a draw of reward -inf is learned from as one so much less likely than all others
HISTORY = ("moved", "learning_rate")  # figures of each step that are kept
HEADROOM = 1.1  # times the draws that a precision seems to need


@dataclass(frozen=True)
class Plan:
    """What an adaptation is to reach, and what it may cost.

    :param num_particles: the most draws of each prompt in a chain.
    :param round_size: draws of each prompt in a round that teaches.
    :param prior_share: alpha, the prior's share of each later round.
    :param train_below: the effective share of the prior's draws below which a policy is trained.
    :param num_steps: the most steps of training in a chain.
    :param target_ess: effective draws of each prompt, of all chains together.
    :param log_evidence_stderr: the standard error of each prompt's log Z.
    :param max_seconds: after which no round begins.
    """

    num_particles: int
    round_size: int = 64
    prior_share: float = 0.2
    train_below: float = 0.02
    num_steps: int = 96
    target_ess: float | None = None
    log_evidence_stderr: float | None = None
    max_seconds: float | None = None


class Precision(NamedTuple):
    """What the draws of all chains so far say of the posterior.

    :param num_draws: of each prompt.
    :param ess: (prompt,).
    :param stderr: the standard error of log Z, (prompt,).
    :param alive: the draws of positive probability of the prompt that has fewest.
    :param doubt: why the weights may not tell all, or None.
    """

    num_draws: int
    ess: Array
    stderr: Array
    alive: int
    doubt: str | None

    @property
    def share(self) -> float:
        """The effective share of the draws of the prompt that has least."""
        return float(self.ess.min()) / self.num_draws

    def reason_to_train(self, plan: Plan) -> str | None:
        """Return why a policy is to be trained, or None."""
        if self.alive < 2 or plan.num_steps == 0:
            return None
        if self.share < plan.train_below:
            return f"{self.share:.1%} of the prior's draws are effective, and {plan.train_below:.0%} would do"
        return None

    def reached(self, plan: Plan) -> str | None:
        """Return which precision is reached, or None. It is not while there is a doubt."""
        wanted = [
            None if plan.target_ess is None else (self.ess.min() >= plan.target_ess, f"{self.ess.min():.0f} effective"),
            None
            if plan.log_evidence_stderr is None
            else (self.stderr.max() <= plan.log_evidence_stderr, f"log Z known to {self.stderr.max():.2g}"),
        ]
        goals = [goal for goal in wanted if goal is not None]
        if not goals or self.doubt is not None or not all(is_met for is_met, _ in goals):
            return None
        return ", ".join(text for _, text in goals)

    def needed(self, plan: Plan) -> float:
        """Return the draws that the precision still needs, if they are like those so far; inf if that is not known."""
        factor = 1.0 if plan.target_ess or plan.log_evidence_stderr else math.inf
        with np.errstate(divide="ignore"):
            if plan.target_ess is not None:
                factor = max(factor, float(plan.target_ess / self.ess.min()))
            if plan.log_evidence_stderr is not None:
                factor = max(factor, float(self.stderr.max() / plan.log_evidence_stderr) ** 2)
        return math.inf if self.doubt is not None else HEADROOM * (factor - 1.0) * self.num_draws


class AdaptiveChain:
    """The draws of one chain, and the policy that is trained on them.

    :param program: the program, inspected.
    :param guide: the policy, new for this chain.
    :param own_weights: whether a draw is weighted by the proposals of its own round alone.
    """

    def __init__(
        self,
        program: Program,
        guide: AutoPolicy,
        plan: Plan,
        own_weights: bool,
        chain: int,
        num_chains: int,
        stopwatch: Stopwatch,
    ) -> None:
        self._program, self._plan, self._turns = program, plan, torch.empty(0, dtype=torch.long)
        self._last, self._until = 0, 0.0  # the step and the time at which a round of training ends
        self.guide = guide
        self.draws = ProposalDraws(program, guide, plan.round_size, own_weights)
        self.training = Training(
            program,
            guide,
            LogVariance(BATCH, self._source),
            TrustRegion(),
            # twice: the region ends at a quarter of its start, as a policy is never finished
            budget=Budget(steps=max(1, 2 * plan.num_steps)),
            callbacks=(lambda record: Reply(stop=record.step >= self._last or time.perf_counter() >= self._until),),
            owns_guide=True,
            chain=chain,
            num_chains=num_chains,
            progress=False,
            stopwatch=stopwatch,
        )

    def learn(self, until: float) -> None:
        """Take some steps of training, until a time at most, and make a proposal of the policy."""
        begun = self.training.step
        self._last, self._until = min(begun + STEPS, self._plan.num_steps), until
        teachers = self.draws.teachers()[-NEWEST:].flip(0)
        new = min(len(teachers), self._plan.round_size)
        self._turns = torch.cat([teachers[:new], teachers[new:][torch.randperm(len(teachers) - new)]])
        if begun < self._last and time.perf_counter() < until:
            self.training.ended = False
            self.training.run(None)
            if self.training.interrupted:
                raise KeyboardInterrupt
        if self.training.step > begun:
            with self.training.own_params():
                self.draws.keep()

    def extend(self, num: int) -> None:
        """Add a round of draws."""
        with self.training.own_params():
            if not self.draws.num_policies:
                self.draws.add(self._draw(None, num), None)
                return
            num_prior = max(1, math.ceil(self._plan.prior_share * num))
            prior = self._draw(None, num_prior)
            self.draws.add(prior, self._draw(self.guide, num - num_prior) if num > num_prior else None)

    def first(self, num_rounds: int) -> tuple[Particles, Tensor, Array]:
        """Return the first rounds' draws, log weights and strata, see `ProposalDraws.first`."""
        with self.training.own_params():
            return self.draws.first(num_rounds)

    def _draw(self, guide: AutoPolicy | None, num: int) -> Particles:
        particles, interrupted = draw(self._program, guide, num)
        if interrupted:
            raise KeyboardInterrupt  # half a round is of another mixture
        return particles

    def _source(self, program: Program, guide: Any, num_particles: int, state: State) -> tuple[Particles, State]:
        """Pick draws to learn from, none a second time before all have had their turn: a `Source`."""
        particles, teachers = self.draws.particles, self.draws.teachers()[-NEWEST:]
        assert particles is not None, "the first draws are the prior's"
        while len(self._turns) < num_particles:
            self._turns = torch.cat([self._turns, teachers[torch.randperm(len(teachers))]])
        rows, self._turns = self._turns[:num_particles], self._turns[num_particles:]
        particles = particles[rows.to(particles.log_prior.device)]
        likelihood = particles.total_log_likelihood
        least = likelihood.masked_fill(torch.isneginf(likelihood), torch.inf).amin(0)
        floored = torch.maximum(likelihood, least.masked_fill(least == torch.inf, 0.0) - DEAD)
        return replace(particles, log_likelihood={"likelihood": floored}), state


def adapt(
    chains: Sequence[AdaptiveChain], plan: Plan, engine: str, stopwatch: Stopwatch, report: Report
) -> tuple[dict[str, Any], bool]:
    """Draw and train in rounds until the precision or the budget of the plan.

    :returns: figures for ``stats``, and whether Ctrl-C ended it.
    """
    notes: list[str] = []
    rounds: list[Precision] = []
    reason: str | None = None
    size = min(plan.round_size, plan.num_particles)

    def left() -> float:
        return math.inf if plan.max_seconds is None else plan.max_seconds - stopwatch.seconds()

    with keeping(lambda: so_far(chains)) as run:
        while True:
            begun, first = time.perf_counter(), not rounds
            for chain in chains:
                chain.extend(size)
            seconds_each = (time.perf_counter() - begun) / size
            now = precision(chains)
            rounds.append(now)
            report(size * len(chains), {"ess": float(now.ess.min()), "± log Z": float(now.stderr.max())})
            done = now.num_draws // len(chains)
            if first:
                notes.append(f"{done} draws of the prior: {now.ess.min():.1f} effective")
            ended = now.reached(plan)
            if ended is None and done >= plan.num_particles:
                ended = "the most draws that are allowed"
            if ended is None and left() <= 0:
                ended = f"{plan.max_seconds:g} seconds are over"
            if ended is not None:
                notes.append(f"end after {done} draws: {ended}" + ("" if now.doubt is None else f"; but {now.doubt}"))
                break
            if reason is None and (reason := now.reason_to_train(plan)) is not None:
                notes.append(f"a policy is trained after {done} draws: {reason}")
                report(0, what=f"{engine}, with a policy that learns")
            learns = reason is not None and chains[0].training.step < plan.num_steps and 2 * done <= plan.num_particles
            if learns:
                share, start = left() / 2 / len(chains), time.perf_counter()
                for i, chain in enumerate(chains):
                    chain.learn(start + share * (i + 1))
            wanted = min(
                plan.round_size if learns else done, now.needed(plan) / len(chains), max(left(), 0.0) / seconds_each
            )
            size = min(max(1, math.ceil(wanted)), plan.num_particles - done)
    if run.interrupted:
        notes.append("interrupted")
    some = {"notes": notes, "round_draws": np.array([each.num_draws for each in rounds])}
    return some | {"round_ess": np.array([each.ess for each in rounds])}, run.interrupted


@validated
def run_adaptively(
    program: Program,
    plan: Plan,
    *,
    engine: str,
    num_chains: int,
    stopwatch: Stopwatch,
    progress: bool,
    guide: LanguageModel | Callable[[Program], AutoPolicy] | None = None,
    own_weights: bool = False,
) -> Posterior:
    """Return the posterior of an adaptation; see `inference.adaptive_importance` for its ``stats``.

    :param engine: the engine's name.
    :param guide: what is trained: a copy of a language model, or what a function makes of the program.
    :param own_weights: whether a draw is weighted by the proposals of its own round alone.
    """
    chains = []
    for i in range(num_chains):
        policy: Any = None
        if guide is None or isinstance(guide, LanguageModel):
            policy = AutoPolicy(program, start=guide)
        else:
            policy = guide(program)
        if not isinstance(policy, AutoPolicy):
            raise TypeError(
                f"{engine}: guide must be a function that returns an AutoPolicy, got {show(policy)} from it"
            )
        chains.append(AdaptiveChain(program, policy, plan, own_weights, i, num_chains, stopwatch))
    most = plan.num_particles * num_chains
    what = f"at most {most} draws {of_prompts(program)}"
    with track(f"{engine}, draws of the prior", most, progress, plan=what) as report:
        figures, interrupted = adapt(chains, plan, engine, stopwatch, report)
    particles, log_weights, evidence = weighted(chains)
    by_chain = to_numpy(log_weights).reshape(num_chains, -1, log_weights.shape[-1])
    best = max(range(num_chains), key=lambda c: ess(by_chain[c : c + 1]).min())
    trained = chains[best].draws.num_policies > 0
    histories = [{key: chain.training.history.get(key, []) for key in HISTORY} for chain in chains]
    figures |= stack_chains(histories) if trained else {}
    figures |= {"steps": chains[0].training.step, "policies": chains[0].draws.num_policies}
    from_prior = np.concatenate([chain.draws.components[: len(by_chain[0])] == 0 for chain in chains])
    return posterior(
        program,
        particles,
        engine=engine,
        kind="weighted",
        num_chains=num_chains,
        stats=stopwatch.stats() | figures | {"interrupted": interrupted},
        evidence=evidence,
        log_weights=log_weights,
        prior=particles[torch.as_tensor(from_prior)],
        policy=chains[best].training.policy if trained else None,
    )


def so_far(chains: Sequence[AdaptiveChain]) -> SoFar | None:
    """Return the draws of the rounds that all chains have; None before the first."""
    num = min(chain.draws.num_rounds for chain in chains)
    return SoFar(particles=Particles.concatenate([chain.draws.first(num)[0] for chain in chains])) if num else None


def weighted(chains: Sequence[AdaptiveChain]) -> tuple[Particles, Tensor, Estimate]:
    """Return the draws of the rounds that all chains have, chain-major, their log weights, and log Z with its error."""
    num = min(chain.draws.num_rounds for chain in chains)
    parts, weights, strata = zip(*(chain.first(num) for chain in chains), strict=True)
    particles, log_weights = Particles.concatenate(list(parts)), torch.cat(weights)
    shaped = to_numpy(log_weights).astype(float).reshape(len(chains), -1, log_weights.shape[-1])
    return particles, log_weights, stratified_log_evidence(shaped, np.stack(strata))


def precision(chains: Sequence[AdaptiveChain]) -> Precision:
    """Return what the draws of all chains so far say."""
    particles, weights, (_, stderr) = weighted(chains)
    log_weights = to_numpy(weights).astype(float)[None]
    alive = int(np.isfinite(log_weights).sum((0, 1)).min())
    return Precision(
        num_draws=len(weights),
        ess=ess(log_weights),
        stderr=stderr,
        alive=alive,
        doubt=_doubt(log_weights, to_numpy(particles.total_log_likelihood)) if alive else "no draw is possible",
    )


def _doubt(log_weights: Array, log_likelihood: Array) -> str | None:
    """Return why weights (1, draw, prompt) may not tell all, from k-hat and the values of the likelihood."""
    smoothed, khat = psis(log_weights)
    if (worst := float(np.nan_to_num(khat, nan=-np.inf).max())) > KHAT_LIMIT:
        return f"k-hat is {worst:.2f}, above {KHAT_LIMIT}"
    weights = np.exp(smoothed[0])
    for prompt in range(weights.shape[1]):
        _, level, hits = np.unique(np.round(log_likelihood[:, prompt], 4), return_inverse=True, return_counts=True)
        shares = np.bincount(level, weights[:, prompt])
        if (rare := (shares > LARGE_SHARE) & (hits < FEW_HITS)).any():
            most = int(np.argmax(np.where(rare, shares, 0.0)))
            return f"{hits[most]} draws of one likelihood have {shares[most]:.0%} of the weight"
    return None
