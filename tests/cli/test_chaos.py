"""Small campaigns of `support.chaos`, which ``make chaos`` runs at length."""

from __future__ import annotations

import random

import pytest
from support.chaos import corruption_campaign, kill_campaign


@pytest.mark.long
def test_corrupted_files_end_in_the_right_result_or_an_error_that_names_one(tmp_path):
    counts = corruption_campaign(32, random.Random(0), tmp_path, ["checkpoints", "posterior", "policy", "journal"])
    assert counts["failures"] == 0
    for name in ("checkpoints", "posterior", "policy", "journal"):
        assert counts[f"{name}: refused"] > 0


@pytest.mark.long
def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    counts = kill_campaign(20, random.Random(0), tmp_path)
    assert counts["kills"] == 20
    assert counts["bit-equal"] == counts["runs"] > 0
    assert counts["failures"] == 0


@pytest.mark.long
def test_corrupted_output_folders(tmp_path):
    assert corruption_campaign(60, random.Random(0), tmp_path)["failures"] == 0
