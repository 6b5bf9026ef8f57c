"""The page on bigger networks: its tables are what the formulas say, which count what a small network has."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from support.models import llama_network

from bayeslm.models import LanguageModel

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import scale_tables  # noqa: E402


def test_the_tables_of_the_page_are_those_of_the_formulas():
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert scale_tables.written(page) == page, "python docs/scale_tables.py writes them"


def test_weights_adapters_and_tokens_are_counted_as_of_a_network():
    small = scale_tables.Network("small", 3, 32, 80, 4, 2, 8, 56, tied=False)
    network = llama_network(vocab_size=56, hidden_size=32, intermediate_size=80, num_hidden_layers=3)
    assert small.weights == sum(p.numel() for p in network.parameters())
    lm = LanguageModel(network.to(torch.bfloat16))
    assert small.footprint == lm.causal.footprint
    policy = lm.policy(5)
    assert small.adapters(5) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
