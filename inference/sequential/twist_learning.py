r"""Learning a twist \psi_t(x_{1:t}) ~ E_p[ L(x) | x_{1:t} ], L = exp(r / beta), from draws of the prior.

Draws x ~ p, their likelihoods and the network's hidden states are computed once; the head is then fitted to them, with
early stopping. Two objectives (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv 2404.17546):

* ``contrastive`` twist learning makes the targets \pi_t(x_{1:t}) \propto p(x_{1:t}) \psi_t(x_{1:t}) the posterior's
  own marginals \sigma(x_{1:t}), by the gradient of \sum_t KL(\sigma || \pi_t):

      \sum_t  E_{\pi_t}[\nabla \log \psi_t] - E_\sigma[\nabla \log \psi_t]

  Both expectations are self-normalised over the draws (weights \psi_t and L), which makes the loss the cross-entropy
  -\sum_i \bar L_i \log softmax_i(\log \psi_t) and its bias O(1 / draws).

* ``soft-value`` regression fits the soft Bellman equation, log \psi_t being the soft value / beta,

      \psi_t(x_{1:t}) = \sum_v p(v | x_{1:t}) \psi_{t+1}(x_{1:t}, v),    \psi_T = L

  The paper regresses logarithms and computes the sum over v. Here the draw's own next token estimates the sum, without
  bias for a loss whose minimiser is the mean: that of Poisson regression, \psi_t - y \log \psi_t, with y half L and
  half \psi_{t+1} without gradient (both have the mean \psi_t).

Both are summed over powers of L (`POWERS`). A part of the draws is held out: the head with the lowest contrastive loss
on it is kept, and the power c_t that tempers \psi_t is fitted to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayeslm.inference.program import Particles, Program, ProgramError, check_evidence, inspect, running
from bayeslm.models.lm import POWERS, Twist, TwistInputs
from bayeslm.progress import track
from bayeslm.validation import Count, NonNegative, Positive, Seed, Within, validated

from .prior_draws import PriorDraws, SiteDraws, draw_prior
from .twists import SiteRows

EVALUATE_EVERY = 10  # steps between evaluations of the held-out loss


@dataclass
class TwistData:
    """Completions of the prior, to which a twist is fitted; a row is one text of one particle.

    :param inputs: the inputs of the head.
    :param used: whether a token is part of the loss, (row, token).
    :param log_likelihood: log L of each text, (particle, text); a particle has one text for each prompt, or more.
    """

    inputs: TwistInputs
    used: Tensor
    log_likelihood: Tensor


class Learner(NamedTuple):
    """A twist, and the draws from which it is to be learned."""

    twist: Twist
    data: TwistData


@validated
@dataclass(frozen=True)
class TwistLearning:
    """Train a `Twist` for `SMC`.

    :param method: the loss, "contrastive" or "soft-value".
    :param reads_reward: whether the program's own terms of the text so far are an input of the twist, as in SMC's
        "partial". This is much more precise where a reward is meaningful for unfinished texts (sentiment), and costs no
        model calls; but the reward is then called for every unfinished text and, with ``proposal="twist"``, for each
        of its ``top_k`` continuations.
    :param num_particles: the number of draws of the prior, at least 8; a quarter of them is held out. A sampler draws
        them, if the language model has one, unless ``reads_reward``.
    :param num_steps: the number of gradient steps, each on all draws that are not held out.
    :param learning_rate: the learning rate of AdamW.
    :param weight_decay: the weight decay of AdamW.
    :param site: the name of the completion; None if the program has only one.
    :param seed: seed of all random numbers; None draws from the global random state.
    :param progress: whether to show a progress bar.
    :raises ValueError: if a setting is out of range.
    """

    method: Literal["contrastive", "soft-value"] = "contrastive"
    reads_reward: bool = False
    num_particles: Annotated[int, Within("[8, inf)")] = 1024
    num_steps: Count = 150
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1.0
    site: str | None = None
    seed: Seed | None = None
    progress: bool = True

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Twist:
        """Train a twist for ``model(*args, **kwargs)``.

        The twist's ``stats``: ``loss`` of each step, ``held_out``, the contrastive loss on held-out draws at every
        10th step and at the last, ``kept_step``, the step of the lowest of these, ``gain``, the decrease of
        log (1 + chi^2) of the weights on held-out draws, the mean over tokens (below 0: it does harm), ``method``,
        ``draws`` (``num_particles``), ``seconds``, ``tokens`` and ``model_calls``.

        :raises EvidenceError: if no draw has positive probability.
        :raises ProgramError: if the program has no completion, or several and ``site`` is not one of their names.
        """
        with running(self.seed, sampled=True) as watch:
            program = inspect(model, *args, **kwargs)
            name = self._site(program)
            draws, learners = self.draw(program, [name])
            check_evidence(draws.total_log_likelihood[None].cpu().numpy(), program)
            twist = learners[name].twist
            losses = self.fit(*learners[name])
            twist.stats = watch.stats() | losses | {"method": self.method, "draws": self.num_particles}
            return twist

    def _site(self, program: Program) -> str:
        names = [site.name for site in program.completions]
        if self.site is None and len(names) == 1:
            return names[0]
        if self.site not in names:
            raise ProgramError(f"TwistLearning: site must be one of {names}, got {self.site!r}")
        return self.site

    def draw(self, program: Program, names: list[str]) -> tuple[Particles, dict[str, Learner]]:
        """Draw particles of the prior; return them with what the twists of these sites are to be learned from.

        The twists are not trained, but for the standardisation of their features.
        """
        fns = {name: program.sites[name].fn for name in names}
        twists = {name: Twist(fn.lm, fn.max_new_tokens, reads_reward=self.reads_reward) for name, fn in fns.items()}
        parts: list[PriorDraws] = []
        size = program.max_particles
        with track("draws for the twist", self.num_particles, self.progress) as report, torch.no_grad():
            for done in range(0, self.num_particles, size):
                n = min(size, self.num_particles - done)
                part = draw_prior(program, names, n, reads_reward=self.reads_reward)
                for name, twist in twists.items():
                    site = part.sites[name]
                    if not parts:
                        twist.fit_projection(site.hidden[site.written])
                    # a fifth of the memory, or less
                    part.sites[name] = site._replace(hidden=twist.project(site.hidden))
                parts.append(part)
                report(n)
            log_l = torch.cat([part.log_likelihood for part in parts])
            particles = Particles.concatenate([part.particles for part in parts])
            return particles, {
                name: self._learner(program, name, twist, [part.sites[name] for part in parts], log_l)
                for name, twist in twists.items()
            }

    def _learner(
        self, program: Program, name: str, twist: Twist, parts: list[SiteDraws], log_likelihood: Tensor
    ) -> Learner:
        """Return an untrained twist with its data; it is told how large rewards so far are, if it reads them."""
        hidden, tokens, written, ends, so_far = (torch.cat(x) for x in zip(*parts, strict=True))
        used = written
        if self.reads_reward:
            used = written & ~ends & so_far.isfinite()  # elsewhere SMC uses the program's own terms
            if used.any():
                twist.so_far_scale.copy_(
                    torch.stack([so_far[used].mean(), so_far[used].std(correction=0).clamp_min(1e-6)])
                )
        log_l = SiteRows(program, name, program.sites[name].fn).spread(log_likelihood)
        inputs = twist.inputs(hidden, tokens, so_far if self.reads_reward else None)
        return Learner(twist, TwistData(inputs, used, log_l.reshape(len(log_likelihood), -1).float()))

    def fit(self, twist: Twist, data: TwistData) -> dict[str, Any]:
        """Train the twist; return the losses by step and the step of the head that is kept."""
        # every fourth draw in the order of likelihood is held out, so that both parts have likely ones
        order = data.log_likelihood.amax(1).argsort(descending=True)
        held_out = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        held_out[order[1::4]] = True
        train, test = (_subset(data, chosen) for chosen in (~held_out, held_out))
        fused = twist.mean.device.type in ("cpu", "cuda")  # one kernel for all weights
        optimizer = torch.optim.AdamW(
            twist.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=fused
        )
        losses, test_losses, best = [], [], None
        with torch.enable_grad(), track("the twist", self.num_steps, self.progress) as report:
            for step in range(self.num_steps):
                twist.train()
                loss = LOSSES[self.method](twist(train.inputs), train)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == self.num_steps:
                    twist.eval()
                    with torch.no_grad():
                        test_loss = float(contrastive_of_powers(twist(test.inputs), test))
                    test_losses.append(test_loss)
                    if best is None or test_loss <= best[0]:
                        best = (test_loss, step + 1, copy.deepcopy(twist.state_dict()))
                report(values={"loss": losses[-1]})
        assert best is not None
        twist.load_state_dict(best[2])
        twist.eval()
        with torch.no_grad():
            twist.confidence[1:] = confidence(twist(test.inputs)[..., 0], test)
            saved = gain(twist.confidence[1:] * twist(test.inputs)[..., 0], test)
            psi = twist.confidence[1:] * twist(data.inputs)[..., 0]
            twist.offset[1:] = offset(psi, data)
        return {"loss": losses, "held_out": test_losses, "kept_step": best[1], "gain": saved}


def _subset(data: TwistData, chosen: Tensor) -> TwistData:
    """Return the data of the ``chosen`` particles, a mask (particle,)."""
    rows = chosen.repeat_interleave(len(data.used) // len(chosen))
    inputs = data.inputs
    some = inputs._replace(
        hidden=inputs.hidden[rows],
        tokens=inputs.tokens[rows],
        so_far=None if inputs.so_far is None else inputs.so_far[rows],
    )
    return TwistData(some, data.used[rows], data.log_likelihood[chosen])


def _by_prompt(log_psi: Tensor, data: TwistData) -> tuple[Tensor, Tensor]:
    """Return log psi_t and log L, (particle, text, token), both -inf at tokens that are not part of the loss."""
    shape = (*data.log_likelihood.shape, -1)
    used = data.used.reshape(shape)
    log_l = torch.where(used, data.log_likelihood[..., None], -torch.inf)
    return log_psi.reshape(shape).masked_fill(~used, -torch.inf), log_l


def contrastive(log_psi: Tensor, data: TwistData) -> Tensor:
    """Return the mean over t and prompts of -sum_i L_i log softmax_i(log psi_t), with L normalised.

    :param log_psi: (row, token).
    """
    return contrastive_of_powers(log_psi[..., None], data, (1.0,))


def contrastive_of_powers(log_psi: Tensor, data: TwistData, powers: Sequence[float] = POWERS) -> Tensor:
    """Return the sum over powers a of the contrastive loss for L^a, divided by a, so that it does not vanish with a.

    :param log_psi: the head's estimates, (row, token, power).
    """
    used = data.used.reshape(*data.log_likelihood.shape, -1, 1)  # (particle, text, token, 1)
    log_l = torch.where(used, data.log_likelihood[..., None, None], -torch.inf)
    alive = (log_l > -torch.inf).any(0)  # a prompt whose draws all have likelihood 0 has no loss
    a = torch.tensor(powers, device=log_psi.device)
    weights = (a * log_l).softmax(0).masked_fill(~alive, 0.0)
    log_psi = log_psi.reshape(*used.shape[:-1], -1).masked_fill(~used & alive, -torch.inf)
    share = log_psi.log_softmax(0).masked_fill(weights == 0, 0.0)
    return -(weights * share / a).sum() / alive.sum().clamp_min(1)


def soft_value(log_psi: Tensor, data: TwistData) -> Tensor:
    """Return the mean over t and draws of psi_t - y log psi_t, y half L and half psi_{t+1}, divided by mean(L).

    The level of psi_t, which `offset` fits in the end, is set to its right value first.

    :param log_psi: (row, token).
    """
    log_psi, log_l = _by_prompt(log_psi, data)
    mean_l = data.log_likelihood.logsumexp(0)[:, None] - math.log(len(log_l))
    likelihood = (data.log_likelihood[..., None] - mean_l).exp()
    level = (log_l.logsumexp(0) - log_psi.logsumexp(0)).detach() - mean_l
    psi = (log_psi.detach() + level).exp()
    used = log_psi > -torch.inf
    after = torch.where(used, psi, likelihood)[..., 1:]  # the value of a finished text is its likelihood
    target = (torch.cat([after, likelihood], -1) + likelihood) / 2
    chosen = used & level.isfinite()
    log_psi = (log_psi + level)[chosen]
    return (log_psi.exp() - target[chosen] * log_psi).mean() if len(log_psi) else log_psi.sum()


def soft_value_of_powers(log_psi: Tensor, data: TwistData) -> Tensor:
    """Return the same sum of `soft_value`.

    :param log_psi: the head's estimates, (row, token, power).
    """
    return torch.stack(
        [
            soft_value(log_psi[..., j], replace(data, log_likelihood=power * data.log_likelihood)) / power
            for j, power in enumerate(POWERS)
        ]
    ).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {"contrastive": contrastive_of_powers, "soft-value": soft_value_of_powers}


def confidence(log_psi: Tensor, data: TwistData) -> Tensor:
    """Return the powers c_t (token,) that minimise E[L^2 / psi_t^c] E[psi_t^c] / Z^2, the prompts' geometric mean.

    That is 1 + chi^2 of the posterior from the target at t, the term of step t in the variance of SMC. A head that is
    fitted to few draws is overconfident, which the second moment penalises.

    :param log_psi: of held-out draws, (row, token).
    """
    log_psi, log_l = _by_prompt(log_psi, data)
    alive = log_l.logsumexp(0) > -torch.inf
    grid = torch.linspace(0.2, 1.0, 17, device=log_psi.device)
    costs = torch.stack([_log_moments(c * log_psi, log_l, alive) for c in grid])
    return grid[costs.argmin(0)].where(alive.any(0), 1.0)


def _log_moments(log_psi: Tensor, log_l: Tensor, alive: Tensor) -> Tensor:
    """Return log E[L^2 / psi_t] E[psi_t] / E[L]^2, the sum over prompts, (token,).

    :param log_psi: (particle, text, token), -inf at tokens that are not used, as ``log_l``.
    :param alive: which texts have a likelihood above 0, (text, token).
    """
    second = (2 * log_l - log_psi.nan_to_num(neginf=0.0)).logsumexp(0)
    return torch.where(alive, second + log_psi.logsumexp(0) - 2 * log_l.logsumexp(0), 0.0).sum(0)


def gain(log_psi: Tensor, data: TwistData) -> float:
    """Return how much lower log (1 + chi^2) is with a twist than without one: the mean over tokens, for each prompt.

    :param log_psi: of held-out draws, (row, token).
    """
    log_psi, log_l = _by_prompt(log_psi, data)
    alive = log_l.logsumexp(0) > -torch.inf
    without = torch.where(log_psi == -torch.inf, log_psi, 0.0)
    saved = _log_moments(without, log_l, alive) - _log_moments(log_psi, log_l, alive)
    return float(saved.sum() / alive.sum().clamp_min(1))


def offset(log_psi: Tensor, data: TwistData) -> Tensor:
    """Return the constants b_t (token,) with which the mean of psi_t is that of L, over the draws with a token t.

    :param log_psi: (row, token).
    """
    log_psi, log_l = _by_prompt(log_psi, data)
    gap = (log_l.logsumexp(0) - log_psi.logsumexp(0)).T  # (token, prompt)
    return torch.stack([of[of.isfinite()].mean() if of.isfinite().any() else of.new_zeros(()) for of in gap])
