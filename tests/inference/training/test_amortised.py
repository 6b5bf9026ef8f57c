"""Minibatches of prompts: gradients against enumeration over all prompts, posteriors of each, prompts never trained on.

Vocabulary 4, 3 tokens, and a reward that depends on the prompt's last token: 40 completions a prompt.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from support.family import PROMPTS, Family, T
from support.gradients import assert_unbiased, gradient_of, gradients
from support.models import table_lm, tiny_llama
from support.oracles import kl_to
from support.statistics import assert_evidence
from torch.nn.functional import softplus

from bayeslm.inference import SMC, SVI, Exact, ImportanceSampling, ProgramError
from bayeslm.inference.program import inspect_or_reuse
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Critic,
    ExponentialAverage,
    FDivergence,
    ForwardKL,
    FromPosterior,
    LogVariance,
    Replay,
    ReverseKL,
    StatefulLoss,
)
from bayeslm.inference.training.epochs import next_minibatch
from bayeslm.inference.training.sources import log_q
from bayeslm.models import TiltedLM


@pytest.mark.parametrize(
    "make",
    [
        lambda z: ReverseKL(4),
        lambda z: ReverseKL(1, ExponentialAverage()),
        lambda z: ReverseKL(1, Critic()),
        lambda z: LogVariance(4),
        pytest.param(lambda z: FDivergence("reverse-kl", 4, log_evidence=z), marks=pytest.mark.long),
        lambda z: Trace_ELBO(16, vectorize_particles=True),
    ],
    ids=["reverse KL", "average", "critic", "log-variance", "f-divergence, log Z known", "stock Trace_ELBO"],
)
def test_gradient_is_unbiased_for_all_prompts(make):
    family = Family(PROMPTS * 20)
    parameters = list(family.policy.network.parameters())
    loss = (family.log_q.exp() * (family.log_q - family.log_target)).sum()
    expected = gradient_of(loss, parameters)
    objective = make(family.log_z.detach())
    estimates = gradients(objective, family.model(40), family.guide(40), parameters, (family.prompts,), repeats=75)
    assert_unbiased(estimates, expected)


@pytest.mark.parametrize(
    "objective",
    [ReverseKL(8), Trace_ELBO(16, vectorize_particles=True)],
    ids=["reverse KL", "stock Trace_ELBO"],
)
@pytest.mark.long
def test_gradient_of_the_default_guide_with_other_latents_of_each_prompt(objective):
    """theta ~ N(0, 1) and mood ~ Bernoulli beside the completion, parameters of their own for each of 30 prompts."""
    lm, prompts = table_lm(order=2, seed=5, vocab=4), PROMPTS * 6

    def c(x, mood):
        return (x == 1).sum(-1) * (0.5 + mood)

    def model(prompts):
        with pyro.plate("prompts", len(prompts), subsample_size=12) as batch:
            last = torch.tensor([prompts[i][-1] for i in batch])
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            mood = pyro.sample("mood", dist.Bernoulli(logits=0.5 * last))
            x = pyro.sample("completion", lm([prompts[i] for i in batch], max_new_tokens=T))
            pyro.factor("reward", 0.5 * theta * c(x, mood))

    guide = AutoPolicy(inspect_or_reuse(None, model, (prompts,), {}))
    guide(prompts)  # makes the parameters of continuous latents
    (loc,), (scale,), logits = guide.continuous.locs.parameters(), guide.continuous.scales.parameters(), guide.logits
    prior = dist.Bernoulli(logits=0.5 * torch.tensor([float(prompt[-1]) for prompt in prompts]))
    torch.testing.assert_close(logits["mood"].detach(), prior.logits)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    q = guide.policy(prompts, max_new_tokens=T)
    x = q.enumerate_support()
    score, log_p = q.log_prob(x), lm(prompts, max_new_tokens=T).log_prob(x)
    local = [(score.exp() * (log_p - score + 0.5 * loc * c(x, mood))).sum(0) for mood in (0, 1)]
    mood = dist.Bernoulli(logits=logits["mood"])
    kl = torch.distributions.kl_divergence(dist.Normal(loc, softplus(scale)), dist.Normal(0.0, 1.0))
    kl = kl + torch.distributions.kl_divergence(mood, prior)
    parameters = list(guide.parameters())
    expected = gradient_of((kl - ((1 - mood.probs) * local[0] + mood.probs * local[1])).sum(), parameters)
    assert_unbiased(gradients(objective, model, guide, parameters, (prompts,), repeats=150), expected)


@pytest.mark.parametrize(
    "objective",
    [
        ReverseKL(32),
        LogVariance(32, Replay(capacity=256, every=2)),
        pytest.param("exact draws", marks=pytest.mark.long),
    ],
    ids=["reverse KL", "replay", "exact draws"],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_svi_reaches_the_posterior_of_every_prompt(objective, seed):
    """KL(q || pi*) under 0.03 nats by enumeration, from minibatches of two prompts.

    Prompts of one length and a table that reads all of a text: [1] that goes on with 2 would be [1, 2] to it, and one
    row cannot serve two posteriors.
    """
    prompts = [[1, 1], [2, 3], [1, 3], [1, 2], [3, 2]]
    family = Family(prompts, order=5, seed=seed)
    if objective == "exact draws":
        objective = ForwardKL(64, FromPosterior(Exact().run(family.model(), prompts)))
    assert (family.kl(family.lm) > 0.1).all()
    steps, rate = (300, 0.05) if isinstance(objective, ForwardKL) else (200, 0.08)
    settings = {"num_steps": steps, "optimizer": Adam(rate), "num_samples": 500}
    engine = SVI(objective=objective, seed=seed, progress=False, **settings)
    posterior = engine.run(family.model(2), prompts)
    reached = family.kl(posterior.policy)
    assert (reached < 0.03).all(), reached
    assert (posterior.log_evidence - family.log_z.detach().numpy() < 0.05).all()
    seen = posterior.stats["prompts"]
    assert seen.shape == posterior.stats["elbo"].shape == (1, steps, 2)
    last = posterior.stats["elbo"][0, -50:] - family.log_z.detach().numpy()[seen[0, -50:]]
    assert abs(last.mean()) < 0.1


def test_a_prompts_average_lessens_the_variance_of_minibatches():
    """Where log Z differs between prompts by many nats, one level for all is no baseline."""
    family = Family(PROMPTS * 20)
    family.reward = lambda prompts, x, reward=family.reward: (
        reward(prompts, x) + torch.tensor([10.0 * (len(prompt) + prompt[-1]) for prompt in prompts])
    )
    parameters = list(family.policy.network.parameters())
    spread = {}
    for name, baseline in {"its own": ExponentialAverage(), "one for all": _OneForAll()}.items():
        torch.manual_seed(0)
        found = gradients(ReverseKL(1, baseline), family.model(20), family.guide(20), parameters, (family.prompts,), 60)
        spread[name] = float(found[20:].std(0).norm())
    assert spread["its own"] < 0.3 * spread["one for all"]


class _OneForAll(ExponentialAverage):
    def __call__(self, name, f, prompts, state):
        advantage, state = super().__call__(name, f.reshape(-1, 1), None, state)
        return advantage.reshape(f.shape), state


@pytest.mark.parametrize(
    ("copies", "size", "drawn"),
    [(1, None, 256), (1, 2, 102), (1, 1, 51), pytest.param(20, 2, 16, marks=pytest.mark.long)],
)
def test_draws_after_training_cost_what_those_of_a_minibatch_do(copies, size, drawn):
    """And some draws of very many prompts."""
    family = Family(PROMPTS * copies)
    shape = (len(family.prompts), T)
    posterior = SVI(num_steps=1, seed=0, progress=False).run(family.model(size), family.prompts)
    assert posterior.samples["completion"].shape == posterior.prior["completion"].shape == (1, drawn, *shape)
    asked = SVI(num_steps=1, num_samples=20, num_prior_samples=3, seed=0, progress=False)
    posterior = asked.run(family.model(size), family.prompts)
    assert posterior.samples["completion"].shape == (1, 20, *shape)
    assert posterior.prior["completion"].shape == (1, 3, *shape)


@pytest.mark.parametrize("kind", ["table", pytest.param("llama", marks=pytest.mark.long)])
def test_a_policy_serves_prompts_it_was_never_trained_on(kind):
    """The reward is for saying the prompt's third word, or fourth: KL to `Exact` on prompts held out.

    A table that reads three words has no row that knows all of a prompt's four (the last, "d", tells its rows for
    prompts from those for completions); a Transformer's LoRA has to learn what to attend to.
    """
    if kind == "table":
        lm, prompts = table_lm(order=4, vocab=5), [f"{a} {b} {c} d" for a, b, c in itertools.product("abc", repeat=3)]
        settings, share, word = {"num_steps": 120, "optimizer": Adam(0.1)}, 0.05, 2
    else:
        lm, prompts = tiny_llama(seed=3, scale=1.0), [" ".join(four) for four in itertools.product("abcd", repeat=4)]
        settings, share, word = (
            {"num_steps": 600, "optimizer": Adam(1e-2), "guide": partial(AutoPolicy, lora_rank=8)},
            0.75,
            3,
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, trained_on = [prompts[i] for i in order[::4]], [prompts[i] for j, i in enumerate(order) if j % 4]

    def says_it_again(prompts, completions, **columns):
        pairs = zip(prompts, completions, strict=True)
        return [float(text.split().count(prompt.split()[word])) for prompt, text in pairs]

    model = TiltedLM(lm, says_it_again, beta=0.5, max_new_tokens=2, subsample_size=8)
    settings |= {"num_particles": 16, "num_samples": 2, "seed": 0, "progress": False}
    policy = SVI(**settings).run(model, trained_on).policy
    exact = Exact(num_prior_samples=1).run(TiltedLM(lm, says_it_again, beta=0.5, max_new_tokens=2), held_out)
    after, before = (kl_to(exact, q, held_out).mean() for q in (policy, lm))
    assert after < share * before, (after, before)
    found = {
        name: ImportanceSampling(400, guide=guide, seed=0, progress=False).run(model, held_out)
        for name, guide in {"prior": None, "policy": policy}.items()
    }
    assert found["policy"].prompts == held_out
    with torch.no_grad():  # the standard error of Z-hat / Z, by enumeration: E_q[w^2] / Z^2 - 1 = E_pi[pi / q] - 1
        score = policy(held_out, max_new_tokens=2).log_prob(torch.as_tensor(exact.samples["completion"][0]))
    log_posterior = torch.as_tensor(exact.log_joint[0] - exact.log_evidence)
    spread = ((2 * log_posterior - score).logsumexp(0).expm1() / 400).sqrt().numpy()
    error = np.expm1(found["policy"].log_evidence - exact.log_evidence)
    assert (abs(error) < 5 * spread + 1e-5).all(), error / spread
    assert found["policy"].stats["ess"].mean() > 1.1 * found["prior"].stats["ess"].mean()


def test_draws_are_of_all_prompts_with_columns_observations_and_other_latents_of_their_own():
    """Seven prompts of different lengths in threes, the last chunk overlapping: what `Exact` says of each."""
    lm = table_lm(order=3, vocab=4)
    prompts = ["a", "b", "c", "a b", "b c", "c c a", "a a a a"]
    rating = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])

    def model(prompts, size):
        with pyro.plate("prompts", len(prompts), subsample_size=size) as batch:
            good = pyro.sample("good", dist.Bernoulli(logits=rating[batch] - 0.5))
            x = pyro.sample("completion", lm([prompts[i] for i in batch], max_new_tokens=2))
            length = pyro.deterministic("length", (x != 0).sum(-1), event_dim=0)
            pyro.factor("long", 0.7 * length)
            pyro.sample("rating", dist.Normal(good, 1.0), obs=rating[batch])
            pyro.sample("same", dist.Normal(good, 2.0), obs=torch.tensor(1.0))

    exact = Exact().run(model, prompts, None)
    found = ImportanceSampling(2000, seed=0, progress=False).run(model, prompts, 3)
    assert found.prompts == exact.prompts
    assert_evidence(found, exact.log_evidence)
    assert found.log_evidence_stderr.max() < 0.05  # of log Z that are 0.5 apart
    assert np.ptp(exact.log_evidence) > 0.3
    assert (found.observed["rating"] == rating.numpy()).all()
    assert found.observed["same"] == exact.observed["same"]
    assert found.samples["completion"].shape == (*found.lengths["completion"].shape, 2) == (1, 2000, 7, 2)
    assert (found.lengths["completion"] >= found.samples["length"]).all()
    trained = SVI(num_steps=100, optimizer=Adam(0.08), num_samples=500, seed=0, progress=False).run(model, prompts, 3)
    assert (abs(trained.log_evidence - exact.log_evidence) < 4.5 * trained.log_evidence_stderr + 0.01).all()
    gap = exact.log_evidence - trained.log_weights.mean((0, 1))
    assert (gap < 0.03).all(), gap  # the posterior is of the policy's family


def test_tilted_lm_subsamples_columns_with_their_prompts():
    seen = []

    def reward(prompts, completions, number, same, scale, **columns):
        seen.append(list(zip(prompts, number, strict=True)))
        return [scale * s * n for n, s in zip(number, same, strict=True)]

    prompts, numbers = ["a", "b", "c", "a b", "b c"], [1.0, 2.0, 3.0, 4.0, 5.0]
    model = TiltedLM(table_lm(vocab=4), reward, 1.0, max_new_tokens=2, subsample_size=2)
    for number in (numbers, np.array(numbers), torch.tensor(numbers)):
        columns = {"number": number, "same": [0.5] * 5, "scale": 2.0}
        posterior = ImportanceSampling(3, seed=0, progress=False).run(model, prompts, **columns)
        np.testing.assert_allclose(posterior.rewards["reward"], np.broadcast_to(numbers, (1, 3, 5)))
        SVI(num_steps=3, num_samples=2, seed=0, progress=False).run(model, prompts, **columns)
    pairs = {(prompt, float(number)) for batch in seen for prompt, number in batch}
    assert pairs == set(zip(prompts, numbers, strict=True))
    with pytest.raises(ValueError, match="column 'number' has 2 values for 5 prompts"):
        ImportanceSampling(3, progress=False).run(model, prompts, number=[1.0, 2.0], same=[1.0] * 5, scale=1.0)
    few = ImportanceSampling(3, progress=False).run(model, ["a"], number=[1.0], same=[1.0], scale=1.0)
    assert few.log_weights.shape == (1, 3, 1)
    with pytest.raises(ValueError, match="subsample_size"):
        TiltedLM(table_lm(vocab=4), reward, subsample_size=0)


def test_epochs_give_every_prompt_its_turn():
    waiting, batches = None, []
    for _ in range(7 * 200):  # 3 epochs in 7 minibatches
        batch, waiting = next_minibatch(waiting, 3, 7)
        batches.append(batch)
    turns = torch.stack(batches)
    assert (turns.sort(-1).values.diff(dim=-1) > 0).all()
    for i in range(200):
        assert (torch.bincount(turns[7 * i : 7 * i + 7].flatten()) == 3).all()
    for place in range(7):  # each minibatch of an epoch is a uniform subset: pairs are equally frequent
        pairs = torch.zeros(7, 7)
        for batch in turns[place::7].tolist():
            pairs[torch.tensor(batch)[:, None], torch.tensor(batch)] += 1
        counts = pairs[torch.triu_indices(7, 7, 1).unbind()]
        mean = 200 * 3 / 21  # binomial, sd 4.95: beyond 5.5 sd, one in 10^6 of 147
        assert (counts - mean).abs().max() < 5.5 * (mean * (1 - 1 / 7)) ** 0.5
    assert len(waiting) == 0


def test_kept_draws_stay_with_their_prompts():
    """Learned from again, a minibatch has the score it was drawn with; other engines' draws are their prompts' too."""
    family = Family(PROMPTS)
    program, guide = inspect_or_reuse(None, family.model(2), (PROMPTS,), {}), family.guide(2)
    replay, state, waiting, lots, ages = Replay(capacity=24, every=3), {}, None, [], set()
    for step in range(30):
        asked, waiting = next_minibatch(waiting, 2, len(PROMPTS))
        draws, state = replay(program.on(asked), guide, 8, state)
        got = draws.prompts[0]
        assert (draws.prompts == got).all()
        if step % 3 == 0:
            assert torch.equal(got, asked)
            lots.append(draws)
        age = next(i for i, lot in enumerate(reversed(lots)) if torch.equal(lot.prompts, draws.prompts))
        assert torch.equal(lots[-1 - age].values["completion"], draws.values["completion"])
        ages.add(age)
        torch.testing.assert_close(log_q(program.on(got), guide, draws).detach(), draws.log_proposal)
        x = draws.values["completion"].reshape(8, 2, T)
        some = [PROMPTS[i] for i in got]
        expected = family.lm(some, max_new_tokens=T).log_prob(x) + family.reward(some, x)
        torch.testing.assert_close(draws.log_joint, expected)
    assert ages == {0, 1, 2}  # three lots are kept
    source = FromPosterior(Exact().run(family.model(), PROMPTS))
    draws, _ = source(program.on(torch.tensor([3, 1])), guide, 50)
    x, some = draws.values["completion"].reshape(50, 2, T), [PROMPTS[3], PROMPTS[1]]
    reward = family.reward(some, x)
    torch.testing.assert_close(draws.total_log_likelihood, reward)
    torch.testing.assert_close(draws.rewards["reward"], reward)
    torch.testing.assert_close(draws.log_joint, family.lm(some, max_new_tokens=T).log_prob(x) + reward)


def test_a_subsample_of_the_programs_own():
    """pyro.plate(..., subsample=indices): a posterior of these prompts, and a loss of all, whatever comes next."""
    family = Family(PROMPTS)

    def model(prompts, batch):
        with pyro.plate("prompts", len(prompts), subsample=batch):
            some = [prompts[i] for i in batch]
            x = pyro.sample("completion", family.lm(some, max_new_tokens=T))
            pyro.factor("reward", family.reward(some, x))

    def guide(prompts, batch):
        with pyro.plate("prompts", len(prompts), subsample=batch):
            pyro.sample("completion", family.policy([prompts[i] for i in batch], max_new_tokens=T))

    posterior = ImportanceSampling(4000, seed=0, progress=False).run(model, PROMPTS, torch.tensor([4, 0]))
    error = posterior.log_evidence - family.log_z.detach().numpy()[[4, 0]]
    assert (abs(error) < 4.5 * posterior.log_evidence_stderr).all()
    objective = StatefulLoss(ReverseKL(4000))
    elbo = (family.log_q.exp() * (family.log_target - family.log_q)).sum(0).detach()
    for batch in ([4, 0], [1, 2]):
        loss = objective.loss(model, guide, PROMPTS, torch.tensor(batch))
        figures = objective.last.figures
        assert figures["prompts"].tolist() == batch
        torch.testing.assert_close(figures["elbo"], elbo[batch], atol=0.15, rtol=0)  # sd of a particle under 2
        assert loss == pytest.approx(-2.5 * float(figures["elbo"].sum()), rel=1e-5)


def test_what_a_subsample_cannot_tell_is_refused():
    family = Family(PROMPTS)
    for engine in (Exact(), SMC(progress=False)):
        with pytest.raises(ProgramError, match="leave out subsample_size"):
            engine.run(family.model(2), PROMPTS)
    exact = Exact().run(family.model(), PROMPTS)
    with pytest.raises(ProgramError, match="leave out subsample_size"):
        ImportanceSampling(retained=exact, progress=False).run(family.model(2), PROMPTS)

    def shared(prompts):
        pyro.sample("mood", dist.Normal(0.0, 1.0))
        family.model(2)(prompts)

    def raters(prompts):
        with pyro.plate("raters", 3, subsample_size=2, dim=-2):
            pyro.sample("mood", dist.Normal(0.0, 1.0))
        family.model()(prompts)

    for model, message in ((shared, "'mood' stands outside the plate"), (raters, "'mood' is subsampled or scaled")):
        with pytest.raises(ProgramError, match=message):
            SVI(num_steps=1, progress=False).run(model, PROMPTS)
    for size in (None, 3):
        with pytest.raises(ProgramError, match="subsampled alike"):
            SVI(num_steps=1, guide=family.guide(size), progress=False).run(family.model(2), PROMPTS)
    with pytest.raises(ProgramError, match="other prompts"):
        SVI(num_steps=1, objective=ForwardKL(4, FromPosterior(exact)), progress=False).run(family.model(2), PROMPTS[1:])
