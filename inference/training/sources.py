r"""Where objectives take their particles from: draws x of some distribution s, with log p(x) + l(x) and log s(x).

The distribution is the guide's own, the prior's, or that of another engine's draws; and particles may be kept and used
again, which costs neither networks nor rewards, but for the guide's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayeslm.inference.program import (
    PARTICLES,
    Program,
    ProgramError,
    check_counts,
    sample_sites,
    score_sites,
    site_value,
    token_scores,
    traces,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.posterior import Posterior

from .state import EMPTY, State

BASE = -7046029254386353131  # of the hash that tells particles apart, modulo 2^64; odd
Source = Callable[[Program, Callable[..., Any], int, State], tuple["Draws", State]]
"""``source(program, guide, num_particles, state)`` returns so many particles, and the next state."""


@dataclass
class Draws:
    """Particles as a guide is scored at them.

    ``values[name]`` (particle, *plates, *event) of the guide's sites; ``log_target``, log p + l, ``log_s``, of the law
    that they were drawn from, and ``log_likelihood``, l alone: (particle, weight prompt). ``score`` is what the program
    records under that name, (particle, ...), if it does. ``prompts`` (particle, prompt) are the indices of a
    minibatch's. ``token_scores[name]`` (particle, *plates, token) are log s of completions' tokens, of draws of the
    guide as it still is.
    """

    values: dict[str, Tensor]
    log_target: Tensor
    log_s: Tensor
    log_likelihood: Tensor
    score: Tensor | None
    prompts: Tensor | None = None
    token_scores: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: Tensor | slice) -> Draws:
        return replace(
            self,
            token_scores={},
            values={name: value[rows] for name, value in self.values.items()},
            log_target=self.log_target[rows],
            log_s=self.log_s[rows],
            log_likelihood=self.log_likelihood[rows],
            score=None if self.score is None else self.score[rows],
            prompts=None if self.prompts is None else self.prompts[rows],
        )

    def of_prompts(self, program: Program, prompts: Tensor) -> Draws:
        """Of draws of all prompts, those of a minibatch, in the shapes of its program."""
        sites = {name: program.sites[name] for name in self.values}
        inside = {name: site.dims.index("prompt") - len(site.shape) for name, site in sites.items()}
        score = self.score
        if score is not None and "prompt" in program.sites["score"].dims:
            score = score.index_select(1 + program.sites["score"].dims.index("prompt"), prompts)
        return Draws(
            {name: value.index_select(inside[name], prompts) for name, value in self.values.items()},
            self.log_target[:, prompts],
            self.log_s[:, prompts],
            self.log_likelihood[:, prompts],
            score,
            prompts.expand(len(self.log_s), -1),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names, for a file."""
        named = {"log_target": self.log_target, "log_s": self.log_s, "log_likelihood": self.log_likelihood}
        for name, extra in {"score": self.score, "prompts": self.prompts}.items():
            named |= {} if extra is None else {name: extra}
        return named | {f"values.{name}": value for name, value in self.values.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Draws:
        """What `tensors` gave."""
        values = {name.removeprefix("values."): x for name, x in tensors.items() if name.startswith("values.")}
        prompts = tensors["prompts"].cpu() if "prompts" in tensors else None
        log_target, log_s, log_likelihood = (tensors[name] for name in ("log_target", "log_s", "log_likelihood"))
        return Draws(values, log_target, log_s, log_likelihood, tensors.get("score"), prompts)

    @staticmethod
    def concatenate(parts: list[Draws]) -> Draws:
        scores, prompts = [part.score for part in parts], [part.prompts for part in parts]
        return Draws(
            {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
            torch.cat([part.log_target for part in parts]),
            torch.cat([part.log_s for part in parts]),
            torch.cat([part.log_likelihood for part in parts]),
            None if scores[0] is None else torch.cat(scores),  # type: ignore[arg-type]
            None if prompts[0] is None else torch.cat(prompts),  # type: ignore[arg-type]
        )


def of_guide(
    program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
) -> tuple[Draws, State]:
    """Draw from the guide."""
    return draw_from(program, guide, num_particles), state


def of_prior(
    program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
) -> tuple[Draws, State]:
    """Draw from the prior."""
    return draw_from(program, None, num_particles), state


@torch.no_grad()
def draw_from(program: Program, guide: Callable[..., Any] | None, num_particles: int) -> Draws:
    """Draw from a guide; None is the prior."""
    model_trace, guide_trace = traces(program, guide, num_particles)
    log_p = score_sites(program, model_trace, num_particles)
    nodes = dict(sample_sites(model_trace))
    latents = [site.name for site in program.latents]
    scores: dict[str, Tensor] = {}
    if guide_trace is None:
        drawn, log_s = {name: nodes[name]["value"] for name in latents}, {name: log_p[name] for name in latents}
    else:
        sites = dict(sample_sites(guide_trace))
        drawn = {name: node["value"] for name, node in sites.items()}
        log_s = score_sites(program, guide_trace, num_particles)
        scores = {name: token_scores(node) for name, node in sites.items() if isinstance(node["fn"], Autoregressive)}
    # a latent that the guide leaves out is drawn from the prior, which is then its distribution in q too: it cancels
    counted = [name for name in log_p if name not in latents or name in log_s]
    zero = torch.zeros((num_particles, program.weight_prompts), device=program.device)
    return Draws(
        values=drawn,
        log_target=sum((program.pooled(log_p[name]) for name in counted), zero),
        log_s=sum((program.pooled(term) for term in log_s.values()), zero),
        log_likelihood=sum((program.pooled(log_p[name]) for name in counted if name not in latents), zero),
        score=site_value(program.sites["score"], nodes["score"]["value"], num_particles) if "score" in nodes else None,
        prompts=None if program.minibatch is None else program.minibatch.expand(num_particles, -1),
        token_scores=scores,
    )


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
    ) -> tuple[Draws, State]:
        """Pick draws at random, with replacement.

        :raises ProgramError: if the posterior is of another program, or of other prompts.
        """
        complete = program.whole or program
        posterior, samples = self.posterior, self.posterior.samples
        sites = [site for site in complete.latents if site.name in samples]
        prompts = 1 if complete.shared else complete.full_size
        if len(sites) < len(complete.latents) or posterior.log_joint.shape[-1] != prompts:
            raise ProgramError("the draws to learn from are of another program, or of other prompts")
        rows = torch.randint(posterior.log_joint[..., 0].size, (num_particles,), device=program.device)
        where = rows.cpu().numpy()

        def pick(array: Any) -> Tensor:
            return torch.as_tensor(array.reshape(-1, *array.shape[2:])[where]).to(program.device)

        log_joint = pick(posterior.log_joint).float()
        terms = [pick(term).float() for term in posterior.log_likelihood.values()]
        draws = Draws(
            values={site.name: complete.under_plate(site.name, pick(samples[site.name])) for site in sites},
            log_target=log_joint,
            log_s=log_joint - pick(posterior.log_weights).float(),
            log_likelihood=sum(terms, torch.zeros_like(log_joint)),
            score=pick(samples["score"]) if "score" in samples else None,
        )
        batch = program.minibatch
        return (draws if batch is None else draws.of_prompts(program, batch.to(program.device))), state


@dataclass(frozen=True)
class Replay:
    """Draws of the guide that are kept: every few steps all are new, and in between they come from a buffer.

    (New ones at once, rather than a few in each step: writing many completions takes hardly longer than writing few.)
    Between two lots of new draws the buffer is picked from without replacement: none a second time before all have
    had their turn, in an order that each lot shuffles anew.
    Where prompts are subsampled, a kept minibatch is used again with its draws, picked at random.

    :param capacity: draws that are kept, the newest.
    :param every: steps from one lot of new draws to the next.
    :raises ValueError: if a setting is below 1.
    """

    capacity: int = 4096
    every: int = 4

    def __post_init__(self) -> None:
        check_counts(self, "capacity", "every")

    def __call__(
        self, program: Program, guide: Callable[..., Any], num_particles: int, state: State = EMPTY
    ) -> tuple[Draws, State]:
        """Return new draws, or kept ones.

        The state holds the buffer, ``turns``, its rows in the order of their turns, and ``step``, the steps done.
        """
        step = {"step": torch.tensor(int(state.get("step", 0)) + 1)}
        kept = {name: value for name, value in state.items() if name not in ("step", "turns")}
        if self.repeats(state):
            buffer = Draws.from_tensors(kept)
            rows, turns = _next_rows(buffer, state["turns"], num_particles)
            return buffer[rows], {**kept, **step, "turns": turns}
        new = draw_from(program, guide, num_particles)
        buffer = Draws.concatenate([*([Draws.from_tensors(kept)] if kept else []), new])[-self.capacity :]
        return new, {**buffer.tensors(), **step, "turns": torch.empty(0, dtype=torch.long)}

    def repeats(self, state: State) -> bool:
        """Return whether the next particles are kept ones."""
        return "log_s" in state and int(state["step"]) % self.every != 0


def _next_rows(buffer: Draws, turns: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the next rows of the buffer, and the turns after them."""
    if buffer.prompts is not None:
        return _of_a_minibatch(buffer.prompts, num), turns
    device = buffer.log_s.device
    turns = turns.to(device)
    while len(turns) < num:
        turns = torch.cat([turns, torch.randperm(len(buffer.log_s), device=device)])
    return turns[:num], turns[num:]


def _of_a_minibatch(prompts: Tensor, num: int) -> Tensor:
    """Return rows whose ``prompts`` (particle, prompt) are those of one picked at random: all, or the newest."""
    one = torch.randint(len(prompts), ())
    together = (prompts == prompts[one]).all(-1).nonzero().squeeze(-1)
    return together.repeat(-(-num // len(together)))[-num:]


class _Given(Messenger):
    """Gives sites their values instead of sampling them, and completions' laws the scores that are known of them."""

    def __init__(self, values: dict[str, Tensor], token_scores: dict[str, Tensor]) -> None:
        super().__init__()
        self._values, self._scores = values, token_scores

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["value"] is None and name in self._values:
            msg["value"] = self._values[name]
            if name in self._scores:
                msg["fn"].know(msg["value"], self._scores[name])


def log_q(program: Program, guide: Callable[..., Any], draws: Draws) -> Tensor:
    """log q (particle, weight prompt) of draws under a guide, with gradient. Draws that agree are scored once.

    :raises ProgramError: if they are another law's, and the guide has auxiliary sites, as AutoNormal does.
    """
    which, some = _distinct(draws.values)
    values = {name: value[some] for name, value in draws.values.items()}
    known = {name: scores[some] for name, scores in draws.token_scores.items()}
    n = len(next(iter(values.values())))
    with _Given(values, known), pyro.plate(PARTICLES, n, dim=-1 - program.max_plate_nesting):
        trace = poutine.trace(program.pinned(guide)).get_trace(*program.args, **program.kwargs)
    trace = poutine.util.prune_subsample_sites(trace)
    if unknown := [name for name, _ in sample_sites(trace) if name not in draws.values]:
        raise ProgramError(
            f"the guide samples {unknown[0]!r}, which the draws to learn from do not have: learn from its own draws"
        )
    zero = torch.zeros((n, program.weight_prompts), device=program.device)
    return sum((program.pooled(term) for term in score_sites(program, trace, n).values()), zero)[which]


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
