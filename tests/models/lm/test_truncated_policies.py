"""Policies in the place of a truncated prior: of each token they have what remains of the prior, by enumeration."""

import pytest
import torch
from support.models import tiny_llama, tiny_seq2seq
from support.statistics import assert_drawn_from, assert_evidence, count_completions

from bayeslm.inference import SMC, SVI, Exact, ImportanceSampling
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import redraw

PROMPTS = [[1, 2], [3]]
CUT = {"top_k": 3, "top_p": 0.9, "temperature": 1.2}


def changed(policy):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.network.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=generator)
    return policy


def by_hand(lm, policy, prompt, row):
    """log q of one completion: the policy's own forward pass, masked to what remains of the prior's."""
    total = 0.0
    for t, token in enumerate(row):
        if t and row[t - 1] == 0:
            break
        ids = torch.tensor([[*prompt, *row[:t]]])
        p, q = ((x.network(ids).logits[0, -1] / CUT["temperature"]).detach().double() for x in (lm, policy))
        order = p.argsort(descending=True, stable=True)[: CUT["top_k"]]
        mass = p[order].softmax(-1)
        left = order[mass.cumsum(-1) - mass < CUT["top_p"]]
        total += float(q[token] - q[left].logsumexp(-1)) if token in left else -torch.inf
    return total


@pytest.mark.parametrize("rank", [None, 2])
def test_a_policy_has_what_remains_of_the_prior(rank):
    """It is normalised on the prior's support; its scores are those of the definition; draws follow them."""
    lm = tiny_llama(seed=1)
    policy, prior = changed(lm.policy(rank)), lm(PROMPTS, 3, **CUT)
    dist = prior.with_model(policy)
    support = dist.enumerate_support()
    log_q = dist.log_prob(support).detach()
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(2))
    assert torch.equal(torch.isneginf(log_q), torch.isneginf(prior.log_prob(support)))
    for i, prompt in enumerate(PROMPTS):
        expected = torch.tensor([by_hand(lm, policy, prompt, row) for row in support[::11, i].tolist()])
        torch.testing.assert_close(log_q[::11, i].double(), expected.double(), atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    x = dist.sample((2000,))
    torch.testing.assert_close(dist.token_log_prob(x.clone()), dist.token_log_prob(x), atol=1e-5, rtol=1e-5)
    for i in range(2):
        assert_drawn_from(count_completions(x[:, i], support[:, i], 10), log_q[:, i])
    step = dist.next_token_log_prob(support).exp()
    torch.testing.assert_close(step.sum(-1), torch.ones(step.shape[:-1]))
    new, scores = redraw(dist.expand((2, 2)), x[:2], torch.ones((2, 2), dtype=torch.long), copies=20)
    expected = dist.token_log_prob(new)[..., 1:].sum(-1)
    torch.testing.assert_close(scores.sum(-1), expected, atol=1e-5, rtol=1e-5)
    assert dist.with_model(lm).is_same(prior)
    assert not dist.is_same(prior)


def test_its_gradient_is_that_of_the_enumerated_expectation_in_micro_batches():
    lm = tiny_llama(seed=1)
    policy, found = changed(lm.policy(2)), []
    for size in (None, 7):
        policy.batch_size = size
        dist = lm(PROMPTS, 3, **CUT).with_model(policy)
        support = dist.enumerate_support()
        log_q = dist.log_prob(support)
        f = torch.randn(log_q.shape, generator=torch.Generator().manual_seed(0))
        weights = [p for p in policy.network.parameters() if p.requires_grad]
        found.append(torch.autograd.grad((log_q.exp() * f).sum(), weights))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert sum(float(a.abs().sum()) for a in found[0]) > 0


def test_of_an_encoder_decoder_network_too():
    lm = tiny_seq2seq("bart")
    dist = lm([[3, 4], [5]], 2, top_k=3).with_model(changed(lm.policy()))
    support = dist.enumerate_support()
    torch.testing.assert_close(dist.log_prob(support).detach().exp().sum(0), torch.ones(2))
    x = dist.sample((50,))
    torch.testing.assert_close(dist.token_log_prob(x.clone()), dist.token_log_prob(x), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_svi_nears_the_posterior_and_its_policy_proposes(seed, tmp_path):
    """KL to `Exact` falls, log Z of IS and SMC with the policy is right, and a saved policy is the same."""
    lm = tiny_llama(seed=1)
    model = TiltedLM(
        lm, lambda completions, **_: [float(x.count("a")) for x in completions], 0.7, max_new_tokens=3, top_k=3
    )
    exact = Exact().run(model, PROMPTS)
    policy = SVI(40, num_samples=1, num_prior_samples=0, seed=seed, progress=False).run(model, PROMPTS).policy
    x = torch.as_tensor(exact.samples["completion"][0])
    log_target = torch.as_tensor(exact.log_joint[0] - exact.log_evidence).double()

    def kl(lm_or_policy):
        log_q = lm(PROMPTS, 3, top_k=3).with_model(lm_or_policy).log_prob(x).detach().double()
        return torch.where(torch.isneginf(log_q), 0.0, log_q.exp() * (log_q - log_target)).sum(0)

    assert (kl(policy) < 0.35 * kl(lm)).all(), (kl(policy), kl(lm))
    policy.save_pretrained(tmp_path / "policy")
    loaded = LanguageModel.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(kl(loaded), kl(policy), atol=1e-5, rtol=1e-5)
    for engine in (
        ImportanceSampling(400, guide=policy, seed=seed),
        SMC(20, 20, proposal=policy, twist=policy, seed=seed),
    ):
        assert_evidence(engine.run(model, PROMPTS), exact.log_evidence)
