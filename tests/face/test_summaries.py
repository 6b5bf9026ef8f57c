"""The row over all prompts, and whose draws a posterior holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.toys import from_prior

from bayeslm import summaries


@pytest.mark.parametrize(
    ("values", "expected", "reason"),
    [
        ([0.2, 0.9], 0.9, None),
        ([0.2, np.nan], np.nan, "unknown for 1 of 2 prompts"),
        ([np.nan, np.nan, np.nan], np.nan, "unknown for 3 of 3 prompts"),
        ([np.inf, 0.1], np.inf, None),
    ],
)
@pytest.mark.parametrize("joint", [True, False])
def test_an_unknown_diagnostic_of_a_prompt_is_not_shown_as_the_others(values, expected, reason, joint):
    records = [{"khat": x, "rhat_reward": x, "reward": 1.0, "reward_se": 0.1, "khat_reason": ""} for x in values]
    row = summaries.over_prompts(records, joint=joint)
    assert row["khat"] == pytest.approx(expected, nan_ok=True)
    assert row["rhat_reward"] == pytest.approx(expected, nan_ok=True)
    assert row.get("khat_reason") == reason


@pytest.mark.parametrize("stats", [{}, {"kept_steps": [3]}])
@pytest.mark.parametrize("path", [None, Path("policy")])
def test_only_draws_of_the_policy_alone_have_a_row_of_their_own(stats, path):
    """Adaptive importance sampling has a policy too, but most of its draws may be of the prior."""
    posterior = from_prior(0)
    posterior = replace(posterior, stats=posterior.stats | stats, policy_path=path)
    names = [row.name for row in summaries.rows({"x": posterior})]
    assert names == (["x: policy", "x: weighted"] if stats and path else ["x"])
