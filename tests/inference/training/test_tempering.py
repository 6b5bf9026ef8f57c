"""A tempered likelihood in every objective; the log-variance divergence of particles and of chains' states."""

from __future__ import annotations

import pytest
import torch
from support.gradients import gradients, perturbed, policy_guide
from support.models import table_lm
from support.programs import SHORT, score_table, tilted

from bayeslm.inference import MCMC, SMC, SVI, Exact
from bayeslm.inference.training import (
    Adam,
    Critic,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    FromPosterior,
    LogVariance,
    Renyi,
    ReverseKL,
    StatefulLoss,
)

T = 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReverseKL(8),
        lambda: ReverseKL(8, ExponentialAverage()),
        lambda: ReverseKL(8, Critic()),
        lambda: LogVariance(8),
        lambda: ForwardKL(8),
        lambda: FDivergence("jensen-shannon", 8),
        lambda: Renyi(0.5, 8),
    ],
    ids=["leave-one-out", "average", "critic", "log-variance", "forward KL", "Jensen-Shannon", "Renyi"],
)
def test_an_inverse_temperature_of_a_half_is_twice_the_beta(make):
    """The same draws, and the same gradients step by step; their figures stay those of the target itself."""
    lm, table = table_lm(order=2, seed=0, vocab=4), score_table(0, vocab=4, tokens=T, scale=1.0)
    policy = perturbed(lm)
    found, told = [], []
    for beta, gamma in ((0.5, 0.5), (1.0, 1.0), (0.5, 1.0)):
        loss = StatefulLoss(make())
        loss.inverse_temperature = gamma
        torch.manual_seed(0)
        parameters = list(policy.network.parameters())
        found.append(gradients(loss, tilted(lm, table, beta), policy_guide(policy, T), parameters, (SHORT,), 3))
        told.append(loss.last.figures)
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).norm() > 0.05 * found[2].norm()
    for name in ("elbo", "log_likelihood", "kl"):
        torch.testing.assert_close(told[0][name], told[2][name])


@pytest.mark.parametrize(
    "engine",
    [
        SMC(num_particles=40, num_chains=100, twist="partial", seed=0, progress=False),
        MCMC(num_samples=50, num_chains=100, warmup=20, seed=0, progress=False),
    ],
    ids=["smc", "mcmc"],
)
def test_log_variance_of_other_engines_draws(engine):
    """Under the law of the draws, the posterior, it falls to a twentieth. (KL(q || pi*) need not: it counts what q has
    and the draws have not, and log Z, which would tell, drops out. `ForwardKL` is in test_objectives.py.)
    """
    lm, table = table_lm(order=4, seed=0, vocab=4), score_table(0, vocab=4, tokens=T, scale=1.0)
    model = tilted(lm, table, 0.5)
    exact = Exact().run(model, SHORT)
    x, log_joint = torch.tensor(exact.samples["completion"][0]), torch.tensor(exact.log_joint[0])
    source = FromPosterior(engine.run(model, SHORT))
    settings = {"num_steps": 300, "optimizer": Adam(0.05), "num_samples": 10, "seed": 0, "progress": False}
    policy = SVI(objective=LogVariance(64, source), **settings).run(model, SHORT).policy
    with torch.no_grad():
        log_q = torch.stack([law(SHORT, T).log_prob(x).double() for law in (lm, policy)])
    share, f = log_joint.softmax(0), log_joint - log_q
    before, after = (share * f**2).sum(1) - (share * f).sum(1) ** 2
    assert (after < 0.05 * before).all(), (before, after)
