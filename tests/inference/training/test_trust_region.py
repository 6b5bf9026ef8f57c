"""How far a step moves a guide, against enumeration and closed forms; and steps that stay in their region."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from support.enumerated import PROMPTS, Problem, T
from support.models import tiny_llama
from support.programs import SHORT, score_table, tilted
from support.statistics import assert_mean
from support.trainings import topical

from bayeslm.inference import SVI
from bayeslm.inference.program import inspect, run_particles, seeded
from bayeslm.inference.training import (
    AutoPolicy,
    FDivergence,
    ForwardKL,
    LogVariance,
    Replay,
    ReverseKL,
    TrustRegion,
)
from bayeslm.inference.training.movement import Movement


def movements(model, args, guide, move, repeats=60, num=32):
    """Return KL(q_old || q_new) as `Movement` estimates it, of lots of draws of q_old."""
    with seeded(0), pyro.get_param_store().scope():
        program = inspect(model, *args)
        guide = guide(program) if isinstance(guide, type) else guide
        parts = [Movement(program, guide, run_particles(program, guide, num)) for _ in range(repeats)]
        before = [movement.kl() for movement in parts]
        move(guide)
        return before, [movement.kl() for movement in parts]


def test_the_movement_of_a_policy_is_that_of_all_completions():
    small = Problem()

    def move(guide):
        with torch.no_grad():
            for p in small.parameters:
                p.add_(0.3 * torch.randn_like(p))

    before, after = movements(small.model, (PROMPTS,), small.guide, move)
    with torch.no_grad():
        moved = small.policy(PROMPTS, max_new_tokens=T).log_prob(small.x)
    exact = (small.log_q.exp() * (small.log_q - moved)).sum(0).mean()
    assert np.abs(before).max() < 1e-6
    assert_mean(np.array(after), float(exact.detach()))


LATENTS = {
    "closed form": (dist.Normal, lambda loc: (loc, torch.tensor(0.7)), 0.5 * (0.4 / 0.7) ** 2),
    "by its draws": (dist.SoftLaplace, lambda loc: (loc, torch.tensor(1.0)), None),
    "discrete": (dist.Poisson, lambda loc: (loc.exp(),), math.exp(0.2) * -0.4 + math.exp(0.6) - math.exp(0.2)),
}


@pytest.mark.parametrize("name", LATENTS)
def test_the_movement_of_other_sites(name):
    """A normal's and a Poisson's in closed form; a soft Laplace distribution has none, and is integrated."""
    family, parameters, exact = LATENTS[name]
    place = torch.tensor(0.2)
    if exact is None:
        x = torch.linspace(-60.0, 60.0, 120001, dtype=torch.float64)
        old, new = (family(torch.tensor(c, dtype=torch.float64), torch.tensor(1.0)).log_prob(x) for c in (0.2, 0.6))
        exact = float(torch.trapezoid(old.exp() * (old - new), x))

    def program():
        return pyro.sample("z", family(*parameters(torch.tensor(0.0))))

    def guide():
        return pyro.sample("z", family(*parameters(place)))

    before, after = movements(program, (), guide, lambda guide: place.add_(0.4), repeats=200)
    assert np.abs(before).max() < 1e-6
    if name == "by its draws":
        assert_mean(np.array(after), exact)
    else:
        np.testing.assert_allclose(after, exact, rtol=1e-5)


def test_the_movement_of_several_sites_is_their_sum():
    """AutoPolicy's normal, logits and policy, each moved alone and all together: the chain rule."""

    def shift(parts):
        def move(guide):
            with torch.no_grad():
                for name, p in guide.named_parameters():
                    if any(part in name for part in parts):
                        p.add_(0.2)

        return move

    names = ("continuous", "logits", "policies")
    together = np.mean(movements(topical, (SHORT,), AutoPolicy, shift(names), repeats=4)[1])
    alone = [np.mean(movements(topical, (SHORT,), AutoPolicy, shift([name]), repeats=4)[1]) for name in names]
    assert alone[0] > 0.001
    assert alone[1] == pytest.approx(0.0, abs=1e-6)  # all logits of a category alike
    np.testing.assert_allclose(together, sum(alone), rtol=1e-4)


@pytest.mark.parametrize("made", ["texts alone", "with other latents", "a subclass"])
def test_a_guide_that_has_texts_alone_runs_once_for_a_step(made, monkeypatch):
    """Its distributions after a step are those of a second run of the guide; other guides are run again."""

    class Own(AutoPolicy):
        pass

    model, runs = (topical, []) if made == "with other latents" else (tilted(tiny_llama(0), score_table(0)), [])
    with seeded(0), pyro.get_param_store().scope():
        program = inspect(model, SHORT)
        guide = (Own if made == "a subclass" else AutoPolicy)(program)
        movement = Movement(program, guide, run_particles(program, guide, 4))
        nodes = movement._nodes
        monkeypatch.setattr(movement, "_nodes", lambda: runs.append(1) or nodes())
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(0.1 * torch.randn_like(p))
        kl = movement.kl()
        assert len(runs) == (made != "texts alone")
        monkeypatch.setattr(movement, "_nodes_after", nodes)
        assert kl == movement.kl() > 0.0


class Quadratic:
    """A guide whose KL is a quadratic function of its one parameter."""

    def __init__(self, p: torch.Tensor, curvature: float) -> None:
        self.p, self.curvature, self.start, self.calls = p, curvature, p.detach().clone(), 0

    def kl(self) -> float:
        self.calls += 1
        return float(self.curvature * (self.p.detach() - self.start).square().sum())


def steps(curvature, num_steps=20):
    """Take steps along a constant gradient; return targets, KLs, learning rates, and how far the parameter went."""
    settings = TrustRegion(kl=0.02)
    with pyro.get_param_store().scope():
        p = pyro.param("p", torch.zeros(3)).unconstrained()
        found = []
        adam = settings.start(lambda name: 1.0, lambda: len(found) / num_steps, 1, lambda: Quadratic(p, curvature))
        for t in range(num_steps):
            before = p.detach().clone()
            p.grad = torch.ones(3)
            adam({p})
            target = settings.kl * (1 - t / num_steps) ** 2
            found.append((target, adam.moved, adam.factor, float((p.detach() - before).abs().max())))
        return np.array(found).T


@pytest.mark.parametrize("curvature", [1e-6, 1.0, 1e6])
def test_steps_find_their_size(curvature):
    """Whatever the curvature: no step leaves its region, and soon most fill it (where the largest rate lets them)."""
    target, moved, rate, way = steps(curvature)
    assert (moved <= 1.5 * target * (1 + 1e-6)).all()
    if curvature == 1e-6:
        assert rate[-1] == 0.3  # the largest
    else:
        assert (moved[8:] >= 0.4 * target[8:]).all()
    assert (way > 0).all()


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_step_without_a_finite_kl_is_left_out(kl):
    with pyro.get_param_store().scope():
        p = pyro.param("p", torch.randn(3)).unconstrained()
        movement = Quadratic(p, kl)
        movement.kl = lambda: kl
        adam = TrustRegion().start(lambda name: 1.0, lambda: 0.0, 1, lambda: movement)
        start = p.detach().clone()
        p.grad = torch.ones(3)
        adam({p})
        assert torch.equal(p.detach(), start)
        assert adam.moved == 0.0
        p.grad = torch.ones(3)
        adam({p})
        assert adam.factor == 0.5e-3  # half of the first
        with pytest.warns(UserWarning, match="2 of 2 steps were left out"):
            adam.warn_if_stuck()


def test_an_error_while_the_step_is_measured_leaves_the_guide_where_it_was():
    def fails() -> float:
        raise KeyboardInterrupt

    with pyro.get_param_store().scope():
        p = pyro.param("p", torch.randn(3)).unconstrained()
        movement = Quadratic(p, 1.0)
        movement.kl = fails
        adam = TrustRegion().start(lambda name: 1.0, lambda: 0.0, 1, lambda: movement)
        start = p.detach().clone()
        p.grad = torch.ones(3)
        with pytest.raises(KeyboardInterrupt):
            adam({p})
        assert torch.equal(p.detach(), start)
        assert adam.steps == 1  # no checkpoint takes this for the state before the step


LLAMA_LM = tiny_llama(1)
LLAMA = tilted(LLAMA_LM, score_table(1, tokens=3, scale=4.0))


def subsampled(prompts):
    """A prompt a step."""
    with pyro.plate("prompts", len(prompts), subsample_size=1) as chosen:
        x = pyro.sample("completion", LLAMA_LM([prompts[i] for i in chosen.tolist()], max_new_tokens=3))
        pyro.factor("reward", 3.0 * (x == 1).sum(-1))


RUNS = {
    "reverse KL": (LLAMA, SHORT, {"objective": ReverseKL(16)}),
    "replay": (LLAMA, SHORT, {"objective": LogVariance(16, Replay(64, every=3))}),
    "adapters": (LLAMA, SHORT, {"objective": LogVariance(16), "guide": functools.partial(AutoPolicy, lora_rank=2)}),
    "forward KL": (LLAMA, SHORT, {"objective": ForwardKL(32)}),
    "Jensen-Shannon": (LLAMA, SHORT, {"objective": FDivergence("jensen-shannon", 16)}),
    "minibatches": (subsampled, PROMPTS, {"objective": LogVariance(16, Replay(64, every=2))}),
    "other latents": (topical, SHORT, {"objective": ReverseKL(16), "num_chains": 2}),
    "Pyro's ELBO": (topical, SHORT, {"objective": Trace_ELBO(num_particles=16, vectorize_particles=True)}),
}


ALIKE = ("forward KL", "Jensen-Shannon", "Pyro's ELBO")  # to a region: its texts are those of one step


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] * (x in ALIKE)) for x in RUNS])
def test_trainings_stay_in_the_region_and_learn(name):
    """Every step within 1.5 times its target, most of these near it, and an ELBO above the prior's at the end."""
    model, prompts, settings = RUNS[name]
    steps = 24 if model is topical else 16  # two latents more
    posterior = SVI(steps, optimizer=TrustRegion(), num_samples=400, seed=0, progress=False, **settings).run(
        model, prompts
    )
    target = 0.03 * (1 - np.arange(steps) / steps) ** 2
    moved, rates = posterior.stats["moved"], posterior.stats["learning_rate"]
    assert moved.shape == rates.shape == (settings.get("num_chains", 1), steps)
    assert (moved <= 1.5 * target * (1 + 1e-5)).all()
    assert np.median(moved / target) > 0.3
    weights = posterior.log_weights.mean(1)
    before = sum(posterior.prior[key].mean(1) for key in posterior.log_likelihood)  # E_p of the log-likelihood
    error = np.sqrt(posterior.log_weights.var(1) / 400 + before.var() / 400)
    assert (weights.mean(-1) > before.mean() + 4 * error.max()).all()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_steep_logits_do_not_collapse(seed):
    """A table's rate is found too large for a network whose next token is all but certain."""
    lm, table = tiny_llama(0, scale=6.0), score_table(0, tokens=T, scale=1.0)
    model = tilted(lm, table, 0.5)
    engine = SVI(40, objective=LogVariance(32), optimizer=TrustRegion(), num_samples=8, seed=seed, progress=False)
    policy = engine.run(model, PROMPTS).policy
    with torch.no_grad():
        x = lm(PROMPTS, max_new_tokens=T).enumerate_support()
        log_p, log_q = (network(PROMPTS, max_new_tokens=T).log_prob(x) for network in (lm, policy))
        log_posterior = (log_p + table[torch.arange(T), x].sum(-1) / 0.5).log_softmax(0)
        before, after = ((log.exp() * (log - log_posterior)).sum(0).mean() for log in (log_p, log_q))
    assert after < 0.25 * before


def test_a_kl_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="kl must be positive"):
        TrustRegion(kl=0.0)
