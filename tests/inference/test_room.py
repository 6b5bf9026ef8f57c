"""64 particles of 16 prompts and 512 + 512 tokens of an 8B network fit a card of 80 GB under every engine.

The same code runs on a small network whose passes have the room of that card, scaled: as many rows fit one of them
as by the formula fit one of the 8B network's, and all else is split as it would be there. The formulas themselves are
held against measured memory in tests/models/lm/test_memory.py.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support.allocations import peak_bytes
from support.models import llama_network

from bayeslm.inference import (
    MCMC,
    SMC,
    SVI,
    AdaptiveImportance,
    AnnealedSMC,
    BestOfN,
    ImportanceSampling,
    RejectionSampling,
)
from bayeslm.inference.training import Adam, AutoPolicy, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm import memory, word_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import scale_tables

PARTICLES, PROMPTS, PROMPT, NEW = scale_tables.PARTICLES, scale_tables.PROMPTS, 8, 8
LORA = partial(AutoPolicy, lora_rank=2)
DRAWS = {"num_samples": PARTICLES, "seed": 0, "progress": False}
ENGINES = {
    "importance": ImportanceSampling(PARTICLES, seed=0, progress=False),
    "svi": SVI(1, objective=ReverseKL(PARTICLES), optimizer=Adam(), guide=LORA, num_prior_samples=0, **DRAWS),
    "smc": SMC(PARTICLES, num_chains=1, seed=0, progress=False),
    "annealed": AnnealedSMC(PARTICLES, num_chains=1, seed=0, progress=False),
    "mcmc": MCMC(num_samples=2, num_chains=PARTICLES, warmup=1, seed=0, progress=False),
    "rejection": RejectionSampling(PARTICLES, log_bound=0.0, seed=0, progress=False),
    "adaptive": AdaptiveImportance(PARTICLES, round_size=16, train_below=1.0, guide=LORA, seed=0, progress=False),
    "best of n": BestOfN(4, num_samples=PARTICLES // 4, seed=0, progress=False),
}


def brief(prompts, completions, **columns):
    return [-0.01 * float(len(text)) for text in completions]


@pytest.mark.parametrize(
    "name", [x if x in ("importance", "smc") else pytest.param(x, marks=pytest.mark.long) for x in ENGINES]
)
def test_every_engine_stays_in_the_room_of_a_card(name, monkeypatch):
    network = llama_network(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    words = word_tokenizer([f"w{i}" for i in range(64)], "w0")
    lm = LanguageModel(network, words, eos_token_ids=(), pad_token_id=0, gradient_checkpointing=True)
    [big] = [x for x in scale_tables.settings() if (x.network.name, x.gpus) == ("8B", 1)]
    small, rows = lm.causal.footprint, big.batches.decoding
    assert rows < PARTICLES * PROMPTS // 4  # it is split there
    room = big.batches.room * small.decoding(1, PROMPT + NEW) // big.network.footprint.decoding(1, 1024)
    monkeypatch.setattr(memory, "ON_CPU", room)
    assert lm.causal.batches(PROMPT, NEW).decoding == pytest.approx(rows, abs=2)
    model = TiltedLM(lm, brief, max_new_tokens=NEW)  # whose prompts SMC can divide
    prompts = torch.randint(1, 64, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    lm.policy(2) if name in ("svi", "adaptive") else None  # imports
    posteriors = []
    found = peak_bytes(lambda: posteriors.append(ENGINES[name].run(model, prompts)))
    draws = posteriors[0].stats.get("proposals", PARTICLES)  # rejection keeps those that are not accepted, too
    results = 10 * draws * PROMPTS * NEW * 8  # token ids and scores of all draws, some times over
    adapters = 8 * 4 * sum(p.numel() for p in lm.policy(2).parameters() if p.requires_grad)
    print(name, found, room, results, adapters)
    assert found < 1.15 * room + results + (adapters if name in ("svi", "adaptive") else 0)
