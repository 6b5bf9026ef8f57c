"""What processes send in a step of SVI: sums over particles, which do not grow with their number."""

from __future__ import annotations

import numpy as np
import pytest
from support.counting import counted_bytes_of_steps
from support.models import table_lm
from support.programs import SHORT, score_table, tilted
from support.ranks import launch

from bayeslm.inference import SVI, Exact
from bayeslm.inference.training import Adam, Critic, ForwardKL, LogVariance, Replay, ReverseKL

MODEL = tilted(table_lm(2, seed=0, vocab=4), score_table(0, vocab=4, tokens=3), 0.5)
TOKENS = 3
SAME = 16  # bytes by which messages of one shape may differ: numbers as texts, of seconds for example
FIGURES = 6  # numbers a prompt: five figures and a count
OBJECTIVES = {  # and the sums that they send besides, numbers a prompt
    "reverse": (ReverseKL, 1),  # the sum that is the baseline
    "kept draws": (lambda num: LogVariance(num, Replay(every=2), truncated=True), 6),  # shares, mean, variance; twice
    "forward": (ForwardKL, 3),
    "critic": (lambda num: ReverseKL(num, Critic()), 2 * 6),  # sums and counts of tokens in 3 values and 3 gradients
}
IN_SUITE = ("reverse", "kept draws")


def trained(objective, prompts, num_steps):
    settings = {"num_samples": 64, "num_prior_samples": 0, "seed": 0, "progress": False}
    optimizer = Adam(0.05, schedule="constant")
    return SVI(num_steps, objective=objective, optimizer=optimizer, **settings).run(MODEL, prompts)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What engines import when they first run is imported before the forks."""
    trained(ReverseKL(8, Critic()), SHORT, 1)


@pytest.mark.parametrize("name", [x if x in IN_SUITE else pytest.param(x, marks=pytest.mark.long) for x in OBJECTIVES])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_bytes_of_a_step(size, name):
    exact = Exact().run(MODEL, SHORT).log_evidence
    objective, sums = OBJECTIVES[name]
    a_prompt = 4 * (FIGURES + sums)

    def run(rank):
        found = []
        for particles, prompts in ((16, SHORT[:1]), (16, SHORT), (256, SHORT)):
            with counted_bytes_of_steps() as sent:
                posterior = trained(objective(particles), prompts, num_steps=2)
            found.append((sent.pop("all_reduce") / 2, sent.total() / 2))
        return found, posterior.log_evidence, posterior.log_evidence_stderr

    for (one, two, many), log_evidence, stderr in launch(run, size=size):
        assert one[0] == two[0] == many[0], (one, two, many)
        assert name == "critic" or one[0] == 4 * 5 * 4, one  # a table of 5 x 4 float32 logits
        assert abs(many[1] - two[1]) < SAME, (two, many)
        assert two[1] - one[1] < a_prompt * (len(SHORT) - 1) + SAME, (one, two)
        assert (np.abs(log_evidence - exact) < 4 * stderr).all()
