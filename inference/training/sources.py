r"""What objectives learn from: draws x of some law s, with log p(x) + l(x) and log s(x).

The law is the guide's own, the prior's, or that of another engine's draws; and draws may be kept and learned from
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
    sample_sites,
    score_sites,
    site_value,
    traces,
)
from bayeslm.models.lm import Autoregressive
from bayeslm.posterior import Posterior

BASE = -7046029254386353131  # of the hash that tells draws apart, modulo 2^64; odd
Source = Callable[[Program, Callable[..., Any], int], "Draws"]
"""Gives so many draws for a guide of a program to learn from."""


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
        log_target, log_s, log_likelihood = (tensors[name] for name in ("log_target", "log_s", "log_likelihood"))
        return Draws(values, log_target, log_s, log_likelihood, tensors.get("score"), tensors.get("prompts"))

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


@torch.no_grad()
def of_guide(program: Program, guide: Callable[..., Any] | None, num_particles: int) -> Draws:
    """New draws of a guide; None is the prior."""
    model_trace, guide_trace = traces(program, guide, num_particles)
    log_p = score_sites(program, model_trace, num_particles)
    nodes = dict(sample_sites(model_trace))
    latents = [site.name for site in program.latents]
    scores: dict[str, Tensor] = {}
    if guide_trace is None:
        drawn, log_s = {name: nodes[name]["value"] for name in latents}, {name: log_p[name] for name in latents}
    else:
        log_s = score_sites(program, guide_trace, num_particles)
        sites = dict(sample_sites(guide_trace))
        drawn = {name: node["value"] for name, node in sites.items()}
        scores = {
            name: node["token_log_prob"] for name, node in sites.items() if isinstance(node["fn"], Autoregressive)
        }
    # a latent that the guide leaves out is drawn from the prior, which is then its law in q as well: it cancels
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


def of_prior(program: Program, guide: Callable[..., Any], num_particles: int) -> Draws:
    """New draws of the prior."""
    return of_guide(program, None, num_particles)


class FromPosterior:
    """Draws that another engine has made, picked at random: particles, states of chains, exact draws.

    :param posterior: of the same program and prompts, all of them where these are subsampled; weighted draws come with
        their weights.
    :raises ValueError: if their law is not known: best-of-n's, and those of conditional runs.
    """

    def __init__(self, posterior: Posterior) -> None:
        if posterior.kind == "uncorrected" or posterior.conditional:
            raise ValueError(f"draws of {posterior.engine} are of no known law, conditional runs' neither: use others")
        self._posterior = posterior
        self.digest = blake2b(np.ascontiguousarray(posterior.log_joint).tobytes(), digest_size=8).hexdigest()
        self._draws: tuple[Program, Draws] | None = None

    def __call__(self, program: Program, guide: Callable[..., Any], num_particles: int) -> Draws:
        whole = program.whole or program
        if self._draws is None or self._draws[0] is not whole:
            self._draws = whole, self._read(whole)
        draws = self._draws[1]
        some = draws[torch.randint(len(draws.log_s), (num_particles,), device=program.device)]
        return some if program.minibatch is None else some.of_prompts(program, program.minibatch.to(program.device))

    def _read(self, program: Program) -> Draws:
        def read(array: Any) -> Tensor:
            return torch.as_tensor(array).flatten(0, 1).to(program.device)

        samples = self._posterior.samples
        values = {site.name: read(samples[site.name]) for site in program.latents if site.name in samples}
        prompts = 1 if program.shared else program.full_size
        if len(values) < len(program.latents) or self._posterior.log_joint.shape[-1] != prompts:
            raise ProgramError("the draws to learn from are of another program, or of other prompts")
        log_joint = read(self._posterior.log_joint).float()
        terms = [read(term).float() for term in self._posterior.log_likelihood.values()]
        return Draws(
            values={name: program.under_plate(name, value) for name, value in values.items()},
            log_target=log_joint,
            log_s=log_joint - read(self._posterior.log_weights).float(),
            log_likelihood=sum(terms, torch.zeros_like(log_joint)),
            score=read(samples["score"]) if "score" in samples else None,
        )


class Replay:
    """Draws of the guide that are kept: every few steps all are new, and in between they come from a buffer.

    (New ones at once, rather than a few in each step: writing many completions takes hardly longer than writing few.)
    Between two lots of new draws the buffer is picked from without replacement: none a second time before all have
    had their turn, in an order that each lot shuffles anew.
    Where prompts are subsampled, what is learned from again is a kept minibatch with its draws, picked at random.

    :param capacity: draws that are kept, the newest.
    :param every: steps from one lot of new draws to the next.
    """

    def __init__(self, capacity: int = 4096, every: int = 4) -> None:
        if capacity < 1 or every < 1:
            raise ValueError(f"Replay: capacity and every must be at least 1, got {capacity} and {every}")
        self.capacity = capacity
        self.every = every
        self.reset()

    def reset(self, program: Program | None = None) -> None:
        """Forget them: another training begins."""
        self._program = program
        self._kept: Draws | None = None
        self._turns = torch.empty(0, dtype=torch.long)  # rows of the buffer, in the order of their turns
        self._step = 0

    def state_dict(self) -> dict[str, Tensor]:
        kept = {} if self._kept is None else self._kept.tensors()
        return kept | {"step": torch.tensor(self._step), "turns": self._turns}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._step = int(state["step"])
        self._turns = state["turns"]
        kept = {name: value for name, value in state.items() if name not in ("step", "turns")}
        if "prompts" in kept:
            kept["prompts"] = kept["prompts"].cpu()
        self._kept = Draws.from_tensors(kept) if kept else None

    def __call__(self, program: Program, guide: Callable[..., Any], num_particles: int) -> Draws:
        if self._program is not (program.whole or program):
            self.reset(program.whole or program)  # they are for other prompts
        repeats = self.repeats
        self._step += 1
        if repeats and self._kept is not None:
            return self._kept[self._next(num_particles)]
        new = of_guide(program, guide, num_particles)
        kept = [new] if self._kept is None else [self._kept, new]
        self._kept = Draws.concatenate(kept)[-self.capacity :]
        self._turns = self._turns[:0]
        return new

    @property
    def repeats(self) -> bool:
        """Whether the next draws are kept ones."""
        return self._kept is not None and self._step % self.every != 0

    def _next(self, num: int) -> Tensor:
        """The next rows of the buffer."""
        assert self._kept is not None
        if self._kept.prompts is not None:
            return _of_a_minibatch(self._kept.prompts, num)
        rows = self._kept.log_s
        while len(self._turns) < num:
            shuffled = torch.randperm(len(rows), device=rows.device)
            self._turns = torch.cat([self._turns.to(rows.device), shuffled])
        picked, self._turns = self._turns[:num], self._turns[num:]
        return picked


def _of_a_minibatch(prompts: Tensor, num: int) -> Tensor:
    """Rows whose ``prompts`` (particle, prompt) are those of one picked at random: all there are, or the newest."""
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
                msg["token_log_prob"] = self._scores[name]


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
