r"""Objectives over complete particles; a new one is its mathematics alone.

A guide q is to become \pi^*(x) = p(x) exp(l(x)) / Z, l = r / beta. Particles x_1..x_n come from a distribution s, the
guide's own unless a `sources.Source` says otherwise; an objective sees of them, prompt by prompt,

    log q(x_i), with its gradient     log \tilde p(x_i) = log p(x_i) + l(x_i)     log s(x_i)

and returns a loss whose gradient is the estimate. They train the guide alone: particles have no gradient (no pathwise
one either), nor have the program's own parameters. `ReverseKL` has a file of its own, since it knows more of a program
than these sums.

Where several processes train one guide each has its own particles, and losses take their sums over those of all
(`sums`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from bayeslm.inference.program import Particles, Program, ProgramError, digest_of, ranks
from bayeslm.validation import Count, Finite, Within, validated

from .baselines import less_others
from .objective import Estimate, Objective, of_all_processes
from .sources import FromPosterior, Replay, Source, log_q, of_guide
from .state import State, under, within
from .sums import log_mean_exp, log_totals, softmax, total, with_value

SAME = 1e-3  # nats of a particle, up to which log s counts as log q


class LogDensities(NamedTuple):
    """The log-densities of particles, (particle, prompt): log q with gradient, log p + l, and log s.

    ``num`` is the number of particles; of several processes, of all of them, while the densities are those of this
    process's own. ``prompts`` (prompt,) are the indices of a minibatch's prompts.
    """

    log_q: Tensor
    log_target: Tensor
    log_s: Tensor
    num: int
    prompts: Tensor | None = None


@validated
class ParticleObjective(Objective):
    """A loss of the log-densities of particles; subclasses implement `loss`.

    :param num_particles: of each prompt in a step; all run at once.
    :param source: where they come from; by default the guide. In the figures, particles of another distribution s are
        weighted by q / s.
    :raises ValueError: if there are fewer particles than the loss needs.
    """

    least = 1  # particles that `loss` needs

    def __init__(self, num_particles: Count = 8, source: Source = of_guide) -> None:
        if num_particles < self.least:
            raise ValueError(f"{type(self).__name__}: num_particles must be at least {self.least}, got {num_particles}")
        super().__init__(num_particles)
        self.source = source

    def loss(self, densities: LogDensities) -> Tensor:
        """Return the loss (prompt,), whose gradient is the estimate.

        Of several processes: the loss of all particles, with the gradient of this one's own; see `sums`.
        """
        raise NotImplementedError

    def estimate(
        self, program: Program, guide: Callable[..., Any], state: State, inverse_temperature: float
    ) -> Estimate:
        particles, kept = self.source(program, guide, self.num_particles, within("source", state))
        if len(particles) != (own := ranks().share(self.num_particles)):
            raise ValueError(
                f"{type(self).__name__}: the source has returned {len(particles)} particles in place of {own}. It "
                "returns num_particles, or of several processes each its own, ranks().share(num_particles)"
            )
        if particles.prompts is not None:
            program = program.on(particles.prompts[0])  # which are not this step's where kept particles are used again
        # a latent that the guide leaves to the prior has the prior's density in q too: it cancels
        left_out = torch.zeros_like(particles.log_prior) if particles.log_left_out is None else particles.log_left_out
        likelihood = particles.total_log_likelihood
        target, log_s = particles.log_joint - left_out, particles.log_proposal - left_out
        cooled = (inverse_temperature - 1.0) * likelihood
        cooled = target + cooled.masked_fill(torch.isneginf(likelihood), 0.0)
        num, prompts = self.num_particles, program.minibatch
        densities = LogDensities(log_q(program, guide, particles), cooled, log_s, num, prompts)
        score, loss = densities.log_q.detach(), self.loss(densities)
        figures = self._figures(particles, LogDensities(score, target, log_s, num))
        if ranks().size > 1:
            _check_same(type(self).__name__, loss.detach(), prompts)
        particles = replace(particles, log_proposal=score + left_out)
        return Estimate(loss.sum(), figures, particles, {**state, **under("source", kept)})

    def next_prompts(self, program: Program, state: State) -> tuple[Tensor, State]:
        if isinstance(self.source, Replay) and self.source.repeats(within("source", state)):
            return torch.arange(program.num_prompts), state  # kept particles bring their prompts: no turn is taken
        return super().next_prompts(program, state)

    def num_drawn(self, state: State) -> int:
        is_kept = isinstance(self.source, Replay) and self.source.repeats(within("source", state))
        return 0 if is_kept or isinstance(self.source, FromPosterior) else self.num_particles

    def check_state(self, state: State, program: Program, steps: int) -> None:
        super().check_state(state, program, steps)
        if (check := getattr(self.source, "check_state", None)) is not None:  # of those that keep a state
            check(within("source", state), program, steps)

    def of_another_program(self, state: State) -> State:
        return {name: value for name, value in state.items() if not name.startswith("source.")}

    def gathered(self, state: State) -> State:
        if (of_source := getattr(self.source, "gathered", None)) is None:  # only those that keep draws have it
            return state
        return {**state, **under("source", of_source(within("source", state)))}

    def divided(self, state: State) -> State:
        if (of_source := getattr(self.source, "divided", None)) is None:
            return state
        return {**state, **under("source", of_source(within("source", state)))}

    def _figures(self, particles: Particles, densities: LogDensities) -> dict[str, Tensor]:
        """Return figures (prompt,) of the target itself, whose inverse temperature is 1."""
        log_q, log_target, log_s, _, _ = densities
        ratio = log_q - log_s
        ratio = ratio.masked_fill(ratio.isnan(), -torch.inf)  # NaN: see `_log_weight`
        shares = ratio.softmax(0)

        def mean(x: Tensor) -> Tensor:
            return torch.where(shares > 0, shares * x, 0.0).sum(0)

        likelihood, elbo = mean(particles.total_log_likelihood), mean(log_target - log_q)
        figures = {"elbo": elbo, "log_likelihood": likelihood, "kl": likelihood - elbo}
        if not isinstance(self.source, FromPosterior):  # whose log s may lack a constant
            weights = log_target - log_s
            figures["log_evidence"] = weights.logsumexp(0) - math.log(len(weights))
        if (reward := particles.reward) is not None and reward.shape == shares.shape:
            figures["reward"] = mean(reward.to(shares))
        figures = of_all_processes(figures, ratio.logsumexp(0), len(ratio))
        return figures if particles.prompts is None else figures | {"prompts": particles.prompts[0]}


class LogVariance(ParticleObjective):
    r"""The log-variance divergence, of any s whose support is q's.

        \frac12 Var_s[ log \tilde p(x) - log q(x) ],     estimated by the variance over the particles

    Its gradient is unbiased; log Z drops out. It is 0 only where q is the posterior, whatever s, which makes it the
    loss for particles of other distributions and for kept ones (`Replay`). For s = q the gradient is `ReverseKL`'s with
    the leave-one-out baseline (VarGrad, Richter et al. 2020, arXiv 2010.10436; trajectory balance with log Z profiled
    out, Malkin et al. 2022, arXiv 2201.13259).

    Where no q is the posterior, its minimum depends on s: kept draws of earlier guides lead to another q than new ones,
    which lead to the minimum of KL(q || posterior). ``truncated`` particles are weighted by powers of truncated
    importance weights (Ionides 2008),

        w = min(1, q / s)^a,    a = min(1, V),    V the variance in nats^2 with a = 1

    so that a draw counts as far as q could have drawn it, and none dominates. As q becomes the posterior V vanishes,
    s no longer matters, and all draws count. For s = q all weights are 1.

    :param truncated: whether particles are weighted so.
    :raises ProgramError: if a particle has a reward of -inf.
    """

    least, raises_elbo = 2, True

    def __init__(self, num_particles: Count = 8, source: Source = of_guide, *, truncated: bool = False) -> None:
        super().__init__(num_particles, source)
        self.truncated = truncated

    def loss(self, densities: LogDensities) -> Tensor:
        x = _finite(densities.log_target) - densities.log_q
        n = densities.num
        if not self.truncated:
            return 0.5 * _variance(x, torch.full_like(x, 1 / n), n)
        ratio = (densities.log_q.detach() - densities.log_s).clamp_max(0.0)
        power = _variance(x.detach(), softmax(ratio), n).clamp_max(1.0)
        return 0.5 * _variance(x, softmax(power * ratio), n)


def _variance(x: Tensor, shares: Tensor, num: int) -> Tensor:
    """Return the variance (prompt,) of x (particle, prompt) with these shares of the weight; see `Tensor.var`.

    The mean needs no gradient, as the sum of shares * (x - mean) is 0.
    """
    own = shares * (x - total(shares * x)).square() * (num / (num - 1))
    return with_value(total(own), own.sum(0))


class ForwardKL(ParticleObjective):
    r"""KL(\pi^* || q), by distributional policy gradient.

    Khalifa, Elsahar and Dymetman 2021, arXiv 2012.11635; also the wake phase of reweighted wake-sleep (Bornschein and
    Bengio 2015, arXiv 1406.2751):

        -\sum_i (\bar w_i - b) \nabla log q(x_i),    \bar w \propto \tilde p / s

    Weights are self-normalised, which makes a bias O(1 / n). For q's own particles b = 1 / n is a control variate,
    E_q[\nabla log q] = 0, and the variance vanishes as q becomes the posterior; for others' b = 0, and with
    `FromPosterior` this is maximum likelihood. Rewards of -inf are welcome: such particles have no weight.
    """

    least = 2

    def loss(self, densities: LogDensities) -> Tensor:
        log_weight, n = _log_weight(densities.log_target, densities.log_s), densities.num
        log_sum = log_totals(log_weight).logsumexp(0)
        weight = (log_weight - log_sum).exp()
        control: Tensor | float = 0.0
        if self.source is of_guide:  # whose sampler may draw from s: E_s[q / s \nabla log q] = 0 as well
            control = _log_ratio(densities).exp() / n
        dead = weight.isnan()  # a prompt of which no particle has any weight teaches nothing
        surrogate = -(torch.where(dead, 0.0, weight - control) * densities.log_q).sum(0)
        ratio = (densities.log_target - densities.log_q.detach()).masked_fill(weight == 0, 0.0)
        value = total(weight * ratio) - (log_sum - math.log(n))
        return with_value(torch.where(dead.any(0), 0.0, value), surrogate)


class Divergence(NamedTuple):
    """f(t) of an f-divergence, by functions of log t: f'(t), and f(t) / t."""

    f_prime: Callable[[Tensor], Tensor]
    f_over_t: Callable[[Tensor], Tensor]


@validated
def alpha_divergence(alpha: Finite) -> Divergence:
    """Return f(t) = (t^a - a t - (1 - a)) / (a (a - 1)); 1 and 0 are the limits, the two KLs."""
    if alpha in (0.0, 1.0):
        return DIVERGENCES["reverse-kl" if alpha else "forward-kl"]
    a, b = alpha, alpha - 1.0
    return Divergence(lambda u: (b * u).expm1() / b, lambda u: ((b * u).exp() - a + b * (-u).exp()) / (a * b))


def _js_over_t(u: Tensor) -> Tensor:
    u = u.clamp_max(80.0)  # where it is log(2) / 2 already, and its parts may be inf
    return 0.5 * (math.log(2.0) + logsigmoid(u) - (-u).exp() * (softplus(u) - math.log(2.0)))


Named = Literal["reverse-kl", "forward-kl", "jensen-shannon", "total-variation"]
DIVERGENCES: dict[Named, Divergence] = {
    "reverse-kl": Divergence(lambda u: 1.0 + u, lambda u: u),
    "forward-kl": Divergence(lambda u: -(-u).exp(), lambda u: -(u * (-u).exp()).masked_fill(u == torch.inf, 0.0)),
    "jensen-shannon": Divergence(lambda u: 0.5 * (math.log(2.0) + logsigmoid(u)), _js_over_t),
    "total-variation": Divergence(lambda u: 0.5 * u.sign(), lambda u: 0.5 * (-u).expm1().abs()),
}


@validated
class FDivergence(ParticleObjective):
    r"""D_f(q || \pi^*) = E_{\pi^*}[ f(q / \pi^*) ] (Go et al. 2023, arXiv 2302.08215).

        D_f = E_q[ f(t) / t ],    \nabla D_f = E_q[ f'(t) \nabla log q ],    t(x) = q(x) Z / \tilde p(x)

    with the leave-one-out mean of f' as a baseline and, for particles of another distribution, weights q / s truncated
    at sqrt(n) times their mean (Ionides 2008). Without truncation both are unbiased if log Z is given; by default Z is
    the particles' own estimate, and the bias O(1 / n).

    :param divergence: f, or a name of `DIVERGENCES`.
    :param num_particles: of each prompt in a step.
    :param source: where the particles come from; by default the guide.
    :param log_evidence: log Z of each prompt, (prompt,), where it is known.
    :raises ValueError: if there is no divergence of this name.
    :raises ProgramError: if f' is not finite where a reward is -inf.
    """

    def __init__(
        self,
        divergence: Named | Divergence = "jensen-shannon",
        num_particles: Count = 8,
        source: Source = of_guide,
        *,
        log_evidence: Tensor | Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(num_particles, source)
        self.divergence = divergence
        self.log_evidence = log_evidence

    def loss(self, densities: LogDensities) -> Tensor:
        f = DIVERGENCES[self.divergence] if isinstance(self.divergence, str) else self.divergence
        n, log_q = densities.num, densities.log_q.detach()
        if densities.log_s.isnan().any():
            raise ProgramError(
                "the density of another engine's draws is not known where their reward is -inf, and an f-divergence "
                "needs it there: use ForwardKL, or draw from the guide or the prior"
            )
        if self.log_evidence is None:
            log_z = log_mean_exp(densities.log_target - densities.log_s, n)
        else:
            log_z = torch.as_tensor(self.log_evidence).to(log_q)
            log_z = log_z if densities.prompts is None or log_z.dim() == 0 else log_z[densities.prompts]
        log_t = log_q + log_z - densities.log_target
        unknown = log_z == -torch.inf  # no particle has any weight: nothing is known of the posterior
        f_prime = _finite(torch.where(unknown, 0.0, f.f_prime(log_t)))
        weight = (log_q - densities.log_s).exp()
        weight = torch.minimum(weight, total(weight) / n * n**0.5)
        value = total(weight * torch.where(unknown, 0.0, f.f_over_t(log_t))) / n
        weighted = weight * f_prime
        surrogate = (weight * less_others(f_prime, weighted, total(weighted), n) * densities.log_q).sum(0) / n
        return with_value(value, surrogate)


@validated
class Renyi(ParticleObjective):
    r"""The variational Renyi bound of order a < 1 on n particles of q (Li and Turner 2016, arXiv 1602.02311).

        L = 1 / (1 - a)  log (1/n) \sum_i w_i^{1 - a},     w_i = \tilde p(x_i) / q(x_i)

    a = 0, the default, is the importance-weighted ELBO (Burda, Grosse and Salakhutdinov 2016, arXiv 1509.00519). The
    gradient is unbiased for E[L] on n particles: the score function with VIMCO's baseline, L with w_i replaced by the
    others' geometric mean (Mnih and Rezende 2016, arXiv 1602.06725), and L's own,

        \sum_i (L - L_{-i} - \bar w_i + 1/n) \nabla log q(x_i),    \bar w \propto w^{1 - a}

    where 1/n is a control variate, E_q[\nabla log q] = 0: the variance vanishes as q becomes the posterior.

    :param order: a.
    :param num_particles: n, of each prompt in a step.
    :raises ValueError: if ``order`` is not below 1.
    :raises ProgramError: if a particle has a reward of -inf, or a sampler draws particles that are not q's.
    """

    def __init__(self, order: Annotated[float, Within("(-inf, 1)")] = 0.0, num_particles: Count = 8) -> None:
        super().__init__(num_particles)
        self.order = order

    def loss(self, densities: LogDensities) -> Tensor:
        n, power = densities.num, 1.0 - self.order
        if bool((ratio := _log_ratio(densities)).any()):
            raise ProgramError(
                f"Renyi needs particles of the guide itself, and the sampler's log-density of a text differs from the "
                f"guide's by {float(ratio.abs().max()):.2g} nats: use ReverseKL, ForwardKL or LogVariance, which weigh "
                "particles, or a language model without a sampler"
            )
        log_w = power * (_finite(densities.log_target) - densities.log_q.detach())
        sums = log_totals(log_w)  # (process, prompt)
        of_all = sums.logsumexp(0)
        bound = of_all - math.log(n)
        advantage = bound.expand_as(log_w)
        if n > 1:
            nothing = torch.full_like(log_w[:1], -torch.inf)
            before = torch.cat([nothing, log_w[:-1].logcumsumexp(0)])
            after = torch.cat([nothing, log_w[1:].flip(0).logcumsumexp(0)]).flip(0)
            elsewhere = torch.cat([nothing, sums[: ranks().rank], sums[ranks().rank + 1 :]]).logsumexp(0)
            others = torch.logaddexp(torch.logaddexp(before, after), elsewhere)
            replaced = torch.logaddexp(others, (total(log_w) - log_w) / (n - 1))
            advantage = bound - (replaced - math.log(n))
        surrogate = -((advantage / power - (log_w - of_all).exp() + 1 / n) * densities.log_q).sum(0)
        return with_value(-bound / power, surrogate)


def _check_same(objective: str, loss: Tensor, prompts: Tensor | None) -> None:
    """Check that all processes have the same loss, and the same prompts; one that is not finite has an own error."""
    tensors = {"loss": loss, "prompts": loss.new_empty(0) if prompts is None else prompts}
    seen = {name: digest_of({name: x}) for name, x in tensors.items()}
    every = [message.value for message in ranks().exchange([bool(loss.isfinite().all()), seen])]
    if all(is_finite for is_finite, _ in every) and any(other != seen for _, other in every):
        what = f"in {objective}, whose sums over particles must be those of inference.training.sums, what is found"
        ranks().check_same(what, {**seen, "the loss": f"{loss.tolist()}"})


def _log_ratio(densities: LogDensities) -> Tensor:
    """Return log(q / s) of particles that the guide's own sampler drew; 0 where it is no more than rounding."""
    ratio = densities.log_q.detach() - densities.log_s
    return ratio.where(ratio.abs() > SAME, 0.0)


def _log_weight(log_target: Tensor, log_s: Tensor) -> Tensor:
    """Return log(target / s); -inf where the target is 0, though another engine's log s is not known there (NaN)."""
    return torch.where(torch.isneginf(log_target), log_target, log_target - log_s)


def _finite(x: Tensor) -> Tensor:
    """Return x.

    :raises ProgramError: if a particle makes the objective infinite.
    """
    if not x.isfinite().all():
        raise ProgramError(
            "a reward is -inf (or log p, of what a guide of your own draws outside a truncated prior, or, in half "
            "precision, at its edge): the objective is infinite. Use ForwardKL or a bounded "
            'f-divergence ("jensen-shannon", "total-variation"), for hard constraints; or a finite penalty'
        )
    return x
