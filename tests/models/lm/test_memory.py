"""What passes of small networks hold, as PyTorch's allocator counts it, is what the formulas of `memory` say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.allocations import peak_bytes
from support.models import llama_network

from bayeslm.models import LanguageModel
from bayeslm.models.lm import compiled, memory, remembering
from bayeslm.models.lm.decoding import Decoder, generate
from bayeslm.models.lm.prefix import prefill

# width, inner width, layers, heads of keys and values; two as Llamas are, one wide and shallow
SHAPES = {"grouped": (64, 256, 4, 2), "deep": (64, 128, 8, 4), "wide": (128, 256, 2, 4)}


def model(shape: str, vocabulary: int = 64, **settings) -> LanguageModel:
    width, inner, layers, kv = SHAPES[shape]
    network = llama_network(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_key_value_heads=kv,
        max_position_embeddings=512,
    )
    return LanguageModel(network, eos_token_ids=(), **settings)


def agrees(found: int, formula: int) -> None:
    print(found / formula)
    assert found == pytest.approx(formula, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decoding(shape):
    lm, prompt, new, rows = model(shape), 48, 16, 24
    ids = torch.randint(64, (rows, prompt))
    agrees(peak_bytes(lambda: prefill(lm.causal, ids, None)), lm.causal.footprint.prefill(rows, prompt))
    prompted = lm([[1] * prompt], new).prompted

    def decode() -> object:
        return generate(Decoder(prompted, prompted.prefix(torch.zeros(rows, dtype=torch.long))))

    agrees(peak_bytes(decode), lm.causal.footprint.decoding(rows, prompt + new))


def test_decoding_by_a_compiled_step(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda device: compiled._step)
    lm, prompt, new, rows = model("deep", compile=True), 48, 16, 24
    prompted = lm([[1] * prompt], new).prompted
    found = peak_bytes(lambda: generate(Decoder(prompted, prompted.prefix(torch.zeros(rows, dtype=torch.long)))))
    agrees(found, lm.causal.footprint.decoding(rows, prompt + new))


def test_decoding_with_many_logits():
    lm, rows = model("wide", vocabulary=20_000), 24
    prompted = lm([[1] * 4], 4).prompted
    found = peak_bytes(lambda: generate(Decoder(prompted, prompted.prefix(torch.zeros(rows, dtype=torch.long)))))
    agrees(found, lm.causal.footprint.decoding(rows, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_scoring(shape):
    lm, prompt, new, rows = model(shape), 24, 40, 48
    value = torch.randint(64, (rows, 1, new))
    distribution = lm([[1] * prompt], new).expand((rows, 1))
    agrees(peak_bytes(lambda: distribution.token_log_prob(value)), lm.causal.footprint.scoring(rows, prompt, new))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["grouped", pytest.param("deep", marks=pytest.mark.long), "wide"])
def test_gradients(shape, checkpointing):
    policy, prompt, new, rows = model(shape, gradient_checkpointing=checkpointing).policy(2), 24, 40, 24
    value = torch.randint(64, (rows, 1, new))
    distribution = policy([[1] * prompt], new).expand((rows, 1))

    def gradient() -> None:
        distribution.token_log_prob(value).sum().backward()

    gradient()  # the gradients themselves are there then
    expected = policy.causal.footprint.gradient(rows, prompt, new, checkpointing=checkpointing, prompts=1)
    agrees(peak_bytes(gradient), expected)


def test_batches_fill_the_room_and_do_not_exceed_it():
    causal = model("grouped").causal
    for prompt, new in [(1, 1), (40, 400), (2000, 10), (10, 10**6)]:
        sizes, each = causal.batches(prompt, new), causal.footprint
        cases = [(sizes.prefill, sizes.room // 4, lambda n, p=prompt, e=each: e.prefill(n, p))]
        rest = 3 * sizes.room // 4
        cases += [(sizes.decoding, rest, lambda n, p=prompt, t=new, e=each: e.decoding(n, p + t))]
        cases += [(sizes.scoring(), rest, lambda n, p=prompt, t=new, e=each: e.scoring(n, p, t))]
        for rows, room, held in cases:
            assert (held(rows) <= room < held(rows + 1)) or rows == 1
    assert causal.batches(100, 400).decoding > 3 * causal.batches(100, 400).gradient(checkpointing=False)
    assert causal.batches(100, 400).gradient(checkpointing=True) > 2 * causal.batches(100, 400).gradient(False)


def test_the_room_of_a_gpu_is_what_is_free_at_the_start_of_the_run(monkeypatch):
    """Small changes of what is free do not change it; half precision fits twice as many rows."""
    state = SimpleNamespace(free=60 * 2**30, reserved=2**30, allocated=2**29)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.allocated)
    device = torch.device("cuda", 0)
    assert memory.room(device) == 32 * 2**30
    state.free = 50 * 2**30
    assert memory.room(device) == 32 * 2**30
    state.free = 20 * 2**30
    assert memory.room(device) == 16 * 2**30
    with remembering():
        assert memory.room(device) == 16 * 2**30
        state.free = 2**29
        assert memory.room(device) == 16 * 2**30  # the run's own tensors have taken the rest
    assert memory.room(device) < 2**30
    assert memory.room(torch.device("cpu")) == memory.ON_CPU
    full = model("grouped").causal.footprint
    lm = model("grouped")
    half = LanguageModel(lm.network.to(torch.bfloat16)).causal.footprint
    assert full.scoring(10, 5, 5) == 2 * half.scoring(10, 5, 5)


def test_an_8b_network_draws_hundreds_of_rows_on_one_card():
    """8 billion weights in bfloat16 leave some 60 GB of 80. By the rule before 15 rows were drawn, and 1 trained on."""
    footprint = memory.Footprint(
        32, 4096, 2 * 32 * 8 * 128, 4 * 4096 + 3 * 14336 + 256, 12 * 4096 + 4 * 14336, 128_256, 2
    )
    sizes = memory.Batches(footprint, memory.rounded(60 * 2**30), 512, 512)
    assert sizes.decoding > 150
    assert sizes.gradient(checkpointing=False) >= 4
    assert sizes.gradient(checkpointing=True) >= 64
