"""Programs of several texts: an amortised posterior of a rationale; a dialogue with a tool, by hand."""

import numpy as np
import pyro
import pytest
import torch
from support import dialogues, programs
from support.engines import ENGINES, those
from support.models import table_lm
from support.statistics import assert_agrees, assert_evidence

from bayeslm.inference import SVI, Exact, ProgramError, RunError
from bayeslm.inference.training import Adam, ForwardKL
from bayeslm.models import TiltedLM, rewards


def test_a_guide_reads_the_answer():
    """Amortised over questions and answers it is nearer to p(rationale | question, answer) than any that does not.

    A guide q(z | question) for answers a that are equally frequent has at most the mean ELBO log sum_z exp mean_a
    log p(z, a), here by enumeration.
    """
    lm = table_lm(order=4, seed=2, vocab=4)
    lm.network.table.data *= 2.0
    questions, answers = [[1, 2], [3]], ["b a", "c", "a"]
    prompts, seen = [q for q in questions for _ in answers], answers * len(questions)

    def model(prompts, answers):
        with pyro.plate("prompts", len(prompts)):
            z = pyro.sample("rationale", lm(prompts, max_new_tokens=2))
            pyro.sample("answer", lm(lm.join(prompts, z, "c"), max_new_tokens=3), obs=lm.encode(answers, 3))

    policy = table_lm(order=5, seed=0, vocab=4).policy()
    policy.network.table.data *= 0.1

    def guide(prompts, answers):
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            read = lm.join([[0]] * len(prompts), answers, [lm.detokenize([p[-1:]])[0] for p in prompts])
            pyro.sample("rationale", policy(read, max_new_tokens=2))

    exact = Exact().run(model, prompts, seen)
    engine = SVI(guide=guide, num_steps=40, optimizer=Adam(0.2), seed=0, num_samples=16, num_prior_samples=0)
    with pyro.get_param_store().scope():
        engine.run(model, prompts, seen)
    read = lm.join([[0]] * len(prompts), answers * 2, [lm.detokenize([p[-1:]])[0] for p in prompts])
    q = policy(read, max_new_tokens=2)
    log_q = q.log_prob(torch.as_tensor(exact.samples["rationale"][0])).detach().double()
    joint = torch.as_tensor(exact.log_joint[0]).double()
    elbo = (log_q.exp() * (joint - log_q)).sum(0).mean()
    blind = joint.reshape(-1, len(questions), len(answers)).mean(-1).logsumexp(0).mean()
    assert elbo > blind + 0.1
    assert elbo > exact.log_evidence.mean() - 0.1


def spoken(lm, prompts, values):
    """log p of the turns and of the answer of each prompt, by the definition of `dialogues.dialogue`, one by one."""
    total = []
    for i, prompt in enumerate(prompts):
        text, taken, scores = list(prompt), True, 0.0
        for value in values:
            row = value[i].tolist()
            if not taken:
                scores += 0.0 if row == [0, 0] else -float("inf")
                continue
            written = row[: row.index(3) + 1] if 3 in row else row[: row.index(0) + 1] if 0 in row else row
            if row[len(written) :] != [0] * (2 - len(written)):
                scores += -float("inf")
                continue
            scores += lm([text], 2).token_log_prob(torch.tensor([row]))[0, : len(written)].sum().item()
            words = [t for t in written if t != 0]
            taken = 3 in words
            text += words + ([2] * (1 + words.count(1)) if taken else [])
        answer = torch.tensor([[[2, 0]], [[1, 0]]][i])
        total.append((scores, lm([[*text, 1]], 2).log_prob(answer).item()))
    return total


def test_a_dialogue_is_that_of_its_definition():
    """Every pair of turns; no token of the tool is scored; SVI nears the posterior, and its weights are right."""
    lm, prompts = table_lm(order=4, seed=5, vocab=4), [[1, 2], [2]]
    model = dialogues.dialogue(lm)
    exact = Exact().run(model, prompts)
    rows = [[torch.as_tensor(exact.samples[name][0, k]) for name in ("turn_0", "turn_1")] for k in range(100)]
    by_hand = np.array([spoken(lm, prompts, values) for values in rows])  # (atom, prompt, 2)
    assert exact.samples["turn_0"].shape[1] == len(by_hand)
    np.testing.assert_allclose(exact.log_joint[0], by_hand.sum(-1), atol=1e-5)
    np.testing.assert_allclose(np.exp(by_hand[..., 0]).sum(0), 1.0, atol=1e-5)
    trained = SVI(num_steps=30, num_samples=400, seed=0).run(model, prompts)
    elbo = trained.stats["elbo"][0]
    assert (exact.log_evidence - elbo[-5:].mean(0) < 0.5 * (exact.log_evidence - elbo[0])).all()
    assert_evidence(trained, exact.log_evidence)
    assert set(trained.texts) == {"turn_0", "turn_1"}


def test_a_turn_that_is_not_taken_weighs_nothing():
    """By prior and policy: its score is 0, and no token of it has a gradient."""
    lm = table_lm(order=4, seed=5, vocab=4)
    taken = torch.tensor([True, False])
    for model in (lm, lm.policy()):
        dist = lm([[1], [2]], 3, where=taken).with_model(model)
        x = dist.sample((5,))
        assert (x[:, 1] == 0).all()
        scores = dist.token_log_prob(x.clone())
        assert (scores[:, 1] == 0).all()
        if model is not lm:
            (gradient,) = torch.autograd.grad(scores[:, 1].sum(), list(model.network.parameters()))
            assert (gradient == 0).all()


TABLE = programs.score_table(2, vocab=4, tokens=3)
BOUND = programs.highest(TABLE)


def truncated(prompts):
    lm = table_lm(order=3, seed=2, vocab=4)
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", lm(prompts, max_new_tokens=3, top_p=0.7, stop="ab"))
        pyro.factor("reward", TABLE[torch.arange(3), x].sum(-1))


def at_least_two(prompts):
    """A minimum length as a condition on whole texts."""
    completion = table_lm(order=3, seed=2, vocab=4)(prompts, max_new_tokens=3)
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("completion", completion)
        pyro.factor("length", torch.where(completion.lengths(x) > 1, 0.0, -torch.inf))


REFUSE = {truncated: (), at_least_two: ("svi",)}  # engines that follow a reverse KL
FUNCTIONS = [programs.token_is(0, 2), programs.token_is(1, 1), lambda p: p.lengths["completion"] == 2]


@pytest.mark.parametrize(
    "name", [n for n in those(texts=True, posterior=True) if "mcmc" not in n and "anneal" not in n]
)
@pytest.mark.parametrize("program", REFUSE)
def test_engines_agree_on_what_is_left_of_a_prior(program, name):
    """Truncated and stopped by tokens, or by a condition on the whole: each engine is right, or refuses by name."""
    engine, exact = ENGINES[name].make(3, BOUND, 2), Exact().run(program, programs.SHORT)
    if name in REFUSE[program]:
        with pytest.raises((ProgramError, RunError), match="-inf"):
            engine.run(program, programs.SHORT)
    else:
        assert_agrees(engine.run(program, programs.SHORT), exact, FUNCTIONS)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in those(texts=True, posterior=True) if "mcmc" in n or "anneal" in n])
@pytest.mark.parametrize("program", REFUSE)
def test_markov_moves_agree_on_what_is_left_of_a_prior(program, name):
    posterior = ENGINES[name].make(3, BOUND, 4).run(program, programs.SHORT)
    assert_agrees(posterior, Exact().run(program, programs.SHORT), FUNCTIONS)


def test_a_truncated_prior_is_approached_by_the_forward_kl_too():
    engine = SVI(num_steps=5, objective=ForwardKL(), num_samples=400, seed=0)
    assert_evidence(engine.run(truncated, programs.SHORT), Exact().run(truncated, programs.SHORT).log_evidence)


def test_a_minimum_length_is_no_mask_on_the_end():
    """p(x | at least two tokens), by Bayes' rule, is another distribution than that of a masked end token."""
    lm = table_lm(order=3, seed=2, vocab=4)
    exact = Exact().run(at_least_two, programs.SHORT)
    dist = lm(programs.SHORT, max_new_tokens=3)
    support = torch.as_tensor(exact.samples["completion"][0])
    log_p, first = dist.log_prob(support), dist.next_token_log_prob(support)[..., 0, 0]
    long_enough = dist.lengths(support) > 1
    globally = torch.where(long_enough, log_p.exp() / (1.0 - first.exp()), 0.0).detach().numpy()
    np.testing.assert_allclose(exact.weights()[0], globally, atol=1e-6)


def test_rewards_get_whether_a_text_was_cut():
    """The column ``truncated`` of `TiltedLM`, and the mark in the posterior."""
    seen = {}

    def whole(prompts, completions, truncated, **columns):
        seen.update(zip(completions, map(bool, truncated), strict=True))
        return [0.0 if cut else 1.0 for cut in truncated]

    lm = table_lm(order=3, seed=2, vocab=4)
    exact = Exact().run(TiltedLM(lm, rewards.Reward(whole), beta=0.5, max_new_tokens=2), programs.SHORT)
    cut = (exact.samples["completion"] != 0).all(-1)
    np.testing.assert_array_equal(exact.truncated["completion"], cut)
    np.testing.assert_array_equal(exact.rewards["reward"], 1.0 - cut)
    assert seen["a b"]
    assert not seen["a"]
