"""What moves a guide: norms of gradients, by hand and by enumeration."""

import pyro
import pytest
import torch
from support.family import PROMPTS, Family

from bayeslm.inference import SVI
from bayeslm.inference.program import inspect_or_reuse
from bayeslm.inference.training import Adam, AutoPolicy, ReverseKL
from bayeslm.inference.training.optimizer import ScheduledAdam


@pytest.mark.parametrize(("clip", "kept"), [(None, 20.0), (6.0, 20.0), (2.0, 8.0)])
def test_the_norm_is_of_the_mean_over_prompts(clip, kept):
    """A gradient of norm 20, of a sum over 4 prompts, is one of norm 5 a prompt."""
    pyro.clear_param_store()
    x = pyro.param("x", torch.zeros(2))
    x.grad = torch.tensor([12.0, -16.0])
    optimizer = ScheduledAdam(Adam(clip_norm=clip), lambda name: 0.1, lambda: 0.0, num_prompts=4)
    optimizer([x])
    assert optimizer.gradient_norm == pytest.approx(5.0)
    assert float(x.grad.norm()) == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [None, 100], ids=["all prompts", "a minibatch"])
def test_more_prompts_are_no_larger_gradient(size, seed):
    """The first step's norm is that of the enumerated gradient of the mean over 200 prompts, or 100 of them: 40 draws
    of each leave a noise of a few percent of it.
    """
    family = Family(PROMPTS * 40)
    policy = AutoPolicy(inspect_or_reuse(None, family.model(), (PROMPTS,), {})).policy
    log_q = policy(PROMPTS, family.x.shape[-1]).log_prob(family.x[:, : len(PROMPTS)])
    loss = (log_q.exp() * (log_q - family.log_target[:, : len(PROMPTS)])).sum(0).mean()
    expected = torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad])
    expected = float(torch.cat([g.reshape(-1) for g in expected]).norm())
    engine = SVI(1, objective=ReverseKL(40), num_samples=1, num_prior_samples=0, seed=seed, progress=False)
    posterior = engine.run(family.model(size), family.prompts)
    assert posterior.stats["gradient_norm"] == pytest.approx(expected, rel=0.1)
    assert posterior.prior == {}
