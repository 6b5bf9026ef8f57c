"""Programs of several texts: an amortised posterior of a rationale, given the answer."""

import pyro
import torch
from support.models import table_lm

from bayeslm.inference import SVI, Exact
from bayeslm.inference.training import Adam


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
