r"""Learning a twist \psi_t(x_{1:t}) ~ E_p[ L(x) | x_{1:t} ], L = exp(r / beta), from draws of the prior.

Draws x ~ p and their likelihoods are made once, with the network's hidden states; the head is then fitted to them for
as many steps as pay. Two objectives (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546):

* ``contrastive`` twist learning makes the targets \pi_t(x_{1:t}) \propto p(x_{1:t}) \psi_t(x_{1:t}) the posterior's
  own marginals \sigma(x_{1:t}), by the gradient of \sum_t KL(\sigma || \pi_t):

      \sum_t  E_{\pi_t}[\nabla \log \psi_t] - E_\sigma[\nabla \log \psi_t]

  Both expectations are self-normalised over the draws (weights \psi_t, and L), which makes the loss the cross-entropy
  -\sum_i \bar L_i \log softmax_i(\log \psi_t) and its bias O(1 / draws).

* ``soft-value`` regression fits the soft Bellman equation, log \psi_t being the soft value / beta,

      \psi_t(x_{1:t}) = \sum_v p(v | x_{1:t}) \psi_{t+1}(x_{1:t}, v),    \psi_T = L

  The paper regresses logarithms, with the sum over v at hand. Here the draw's own next token stands for the sum, which
  is unbiased for a loss whose minimiser is the mean: that of Poisson regression, \psi_t - y \log \psi_t, with y half
  L and half the \psi_{t+1} of the step before (both have the mean that is sought), over mean(L) so that figures stay
  near 1.

Both are summed over powers of L (`models.twist.POWERS`). A part of the draws is held out; the head with the lowest
contrastive loss on it is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..models import Autoregressive, Twist
from ..models.progress import track
from ..models.twist import POWERS, TwistInputs, hidden_states
from .checks import check_counts, check_positive
from .program import Program, ProgramError, inspect, run_particles, seeded
from .results import Stopwatch, check_evidence, prompt_labels

METHODS = ("contrastive", "soft-value")
PATIENCE = 10  # steps between looks at what is held out


@dataclass
class Draws:
    """Completions of the prior: ``hidden`` (row, token + 1, width), ``tokens`` (row, token), ``lengths`` (row,).

    And the log-likelihood (particle, column). Rows are particle-major: (particle, *batch) of the site.
    """

    hidden: Tensor
    tokens: Tensor
    lengths: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True)
class TwistLearning:
    """Trains a `Twist` for `SMC`.

    :param method: "contrastive" or "soft-value".
    :param num_particles: draws of the prior, a quarter of which is held out.
    :param num_steps: gradient steps, each on all draws.
    :param learning_rate, weight_decay: of AdamW.
    :param site: the completion, where the program has several.
    :param seed, progress: as in `ImportanceSampling`.
    """

    method: str = "contrastive"
    num_particles: int = 1024
    num_steps: int = 150
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    site: str | None = None
    seed: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "num_particles", "num_steps")
        check_positive(self, "learning_rate")
        if self.method not in METHODS:
            raise ValueError(f"TwistLearning: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.num_particles < 8:
            raise ValueError("TwistLearning: num_particles must be at least 8, of which a quarter is held out")

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Twist:
        """A twist for ``model(*args, **kwargs)``. ``stats``: ``loss`` and ``held_out`` by step, ``kept_step``, and the
        cost.

        :raises EvidenceError: if no draw has positive probability.
        :raises ProgramError: if the program has no completion, or several and ``site`` names none of them.
        """
        with seeded(self.seed), Stopwatch() as watch:
            program = inspect(model, *args, **kwargs)
            name = self._site(program)
            draws = self._draw(program, name)
            check_evidence(draws.log_likelihood[None].cpu().numpy(), prompt_labels(program))
            law = program.sites[name].fn
            twist = Twist(law.lm, law.max_new_tokens)
            twist.fit_projection(draws.hidden.flatten(0, 1))
            history = self._fit(twist, draws)
            twist.stats = watch.read() | history | {"method": self.method, "draws": self.num_particles}
            return twist

    def _site(self, program: Program) -> str:
        names = [site.name for site in program.completions]
        if self.site is None and len(names) == 1:
            return names[0]
        if self.site not in names:
            raise ProgramError(f"TwistLearning: site must be one of {names}, got {self.site!r}")
        return self.site

    def _draw(self, program: Program, name: str) -> Draws:
        parts: list[Draws] = []
        size = program.max_particles
        with track("draws for the twist", self.num_particles, self.progress) as report:
            for done in range(0, self.num_particles, size):
                n = min(size, self.num_particles - done)
                with _Law(name) as seen:
                    particles = run_particles(program, None, n)
                assert seen.law is not None
                value = particles.values[name].reshape(seen.law.batch_shape + seen.law.event_shape)
                total = sum(particles.log_likelihood.values(), torch.zeros_like(particles.log_prior))
                lengths = seen.law.lengths(value).reshape(-1)
                parts.append(Draws(hidden_states(seen.law, value), value.flatten(0, -2), lengths, total))
                report(n)
        return Draws(*(torch.cat([getattr(part, field) for part in parts]) for field in Draws.__annotations__))

    def _fit(self, twist: Twist, draws: Draws) -> dict[str, Any]:
        """Gradient steps; what was seen in each."""
        size = len(draws.log_likelihood)
        rows = len(draws.tokens) // size
        held = torch.zeros(size, dtype=torch.bool, device=draws.tokens.device)
        held[: size // 4] = True
        log_l = draws.log_likelihood.repeat(1, rows // draws.log_likelihood.shape[-1]).float()  # prompts go fastest
        parts = []
        for chosen in (~held, held):
            of = chosen.repeat_interleave(rows)
            parts.append((twist.inputs(draws.hidden[of], draws.tokens[of], draws.lengths[of]), log_l[chosen]))
        optimizer = torch.optim.AdamW(twist.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        losses, held_out, best = [], [], None
        with torch.enable_grad(), track("the twist", self.num_steps, self.progress) as report:
            for step in range(self.num_steps):
                twist.train()
                loss = self._loss(twist, *parts[0])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if (step + 1) % PATIENCE == 0 or step + 1 == self.num_steps:
                    twist.eval()
                    with torch.no_grad():
                        now = float(_over_powers(contrastive, _log_psi(twist, parts[1][0]), parts[1][1]))
                    held_out.append(now)
                    if best is None or now < best[0]:
                        best = (now, step + 1, copy.deepcopy(twist.state_dict()))
                report(values={"loss": losses[-1]})
        assert best is not None
        twist.load_state_dict(best[2])
        twist.eval()
        with torch.no_grad():  # so that the mean of psi_t is Z at every t, over the prompts
            for psi, offset in zip(_log_psi(twist, parts[0][0]), (twist.offset, twist.ahead_offset), strict=True):
                first = psi[..., 0].reshape(*parts[0][1].shape, -1)
                gap = parts[0][1].logsumexp(0)[:, None] - first.logsumexp(0)
                offset[1:] = gap[gap[:, 0] > -torch.inf].mean(0)
        return {"loss": losses, "held_out": held_out, "kept_step": best[1]}

    def _loss(self, twist: Twist, of: TwistInputs, log_l: Tensor) -> Tensor:
        return _over_powers(contrastive if self.method == "contrastive" else soft_value, _log_psi(twist, of), log_l)


def _over_powers(loss: Callable[[Tensor, Tensor, Tensor], Tensor], psi: tuple[Tensor, Tensor], log_l: Tensor) -> Tensor:
    """A loss of values and looks ahead (row, token, power), for each power a of the likelihood over a: as a nears 0, so
    that no power's loss vanishes."""
    value, ahead = psi
    losses = [
        (loss(value[..., j], value[..., j], power * log_l) + loss(ahead[..., j], value[..., j], power * log_l)) / power
        for j, power in enumerate(POWERS)
    ]
    return torch.stack(losses).sum()


def contrastive(log_psi: Tensor, value: Tensor, log_l: Tensor) -> Tensor:
    """Mean over t and prompts of -sum_i L_i log softmax_i(log psi_t), L normalised.

    :param log_psi: (particle * prompt, token), t = 1, ..., T.
    :param value: not needed.
    :param log_l: (particle, prompt).
    """
    log_psi = log_psi.reshape(*log_l.shape, -1)
    alive = log_l.logsumexp(0) > -torch.inf  # a prompt of which no draw has any likelihood teaches nothing
    if not alive.any():
        return 0.0 * log_psi.sum()
    target = log_l[:, alive].softmax(0)[..., None]
    return -(target * log_psi[:, alive].log_softmax(0)).sum(0).mean()


def soft_value(log_psi: Tensor, value: Tensor, log_l: Tensor) -> Tensor:
    """Mean of psi_t - y log psi_t, y half the likelihood and half psi_{t+1}; shapes as in `contrastive`."""
    alive = log_l.logsumexp(0) > -torch.inf
    if not alive.any():
        return 0.0 * log_psi.sum()
    log_psi, value = (x.reshape(*log_l.shape, -1)[:, alive] for x in (log_psi, value))
    log_l = log_l[:, alive, None]
    scale = log_l.logsumexp(0) - torch.tensor(float(len(log_l))).log()
    likelihood = (log_l - scale).exp().expand_as(value)
    after = torch.cat([value.detach().exp()[..., 1:], likelihood[..., -1:]], -1)
    target = (after + likelihood) / 2
    return (log_psi.exp() - target * log_psi).mean()


def _log_psi(twist: Twist, of: TwistInputs) -> tuple[Tensor, Tensor]:
    """log psi_t of the texts so far, by their value and by a look ahead, (row, token, power); but for the offsets."""
    features = twist.features(of)
    value, ahead = twist.value_of(features[:, 1:]), twist.ahead_of(features[:, :-1], of.embedded)
    ended = of.time[:, 1:] == of.time[:, :-1]
    return value, torch.where(ended[..., None], value.detach(), ahead)  # what has ended is not looked ahead of


class _Law(Messenger):
    """Notes the law of a completion as the particles have it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.law: Autoregressive | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self._name:
            self.law = msg["fn"]
