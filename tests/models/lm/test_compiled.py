"""Tokens that a compiled graph writes are those that passes of the network write, up to rounding.

Most tests do not compile the steps (`uncompiled`), which is quick: what is tried are keys and values of a fixed size.
That a step is one graph is tried at the end.
"""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from support.models import ARCHITECTURES, WORDS, llama_network, random_network, table_lm, tiny_llama, tiny_seq2seq
from support.oracles import all_by_hand
from support.zoo import ALL, zoo_network
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from bayeslm.inference import SMC, SVI
from bayeslm.inference.training import ReverseKL
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.models.lm import compiled, memory, redraw, remembering, word_tokenizer

PROMPTS = [[1, 2, 3, 4, 5], [2], [3, 4]]
# Grouped queries; absolute positions; a window that is shorter than the texts, and capped logits.
FAMILIES = ("llama", "gpt2", "gemma2")
SLOW = {"kimi_linear"}  # its reference implementation takes minutes


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda device: compiled._step)


def network_of(family: str):
    return random_network(family, **(ARCHITECTURES[family][0] | {"vocab_size": 12, "num_hidden_layers": 1}))


def both(network, **settings) -> tuple[LanguageModel, LanguageModel]:
    """The same network without a compiled step, and with one."""
    each = [LanguageModel(network, eos_token_ids=(2,), compile=compile, **settings) for compile in (False, True)]
    return each[0], each[1]


def drawn(lm: LanguageModel, seed: int, tokens: int = 7, rows: int = 4, **settings):
    """Completions (row, prompt, token), and the scores that were kept when they were drawn."""
    torch.manual_seed(seed)
    distribution = lm(PROMPTS, tokens, **settings).expand((rows, len(PROMPTS)))
    value = distribution.sample()
    return value, distribution.token_log_prob(value)


def assert_alike(plain: LanguageModel, fixed: LanguageModel, seeds=(0, 1), **settings) -> None:
    """The same draws of a seed, whose scores are those of the network's own forward pass."""
    for seed in seeds:
        (expected, _), (found, scores) = (drawn(lm, seed, **settings) for lm in (plain, fixed))
        assert torch.equal(found, expected)
        right = all_by_hand(plain, PROMPTS, found)
        torch.testing.assert_close(scores, right.detach(), atol=1e-5, rtol=1e-5)


def changed(policy: LanguageModel, seed: int) -> None:
    """Give the adapters of a policy other weights, in place as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_and_scores_are_those_of_the_forward_pass(family):
    plain, fixed = both(network_of(family))
    assert_alike(plain, fixed)
    assert_alike(plain, fixed, [0], rows=1)
    policies = [lm.policy(2) for lm in (plain, fixed)]
    for seed in range(2):
        for policy in policies:
            changed(policy, seed)
        assert_alike(*policies, [seed])


@pytest.mark.long
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", [name for name in ALL if name not in SLOW])
def test_every_architecture_is_drawn_alike_or_refused(name):
    network = zoo_network(name)
    if network is None:
        pytest.skip("no tiny network of it is built here")
    try:
        plain = LanguageModel(network, eos_token_ids=(2,))
    except (TypeError, ValueError) as error:
        pytest.skip(f"is refused as a prior: {error}")
    try:
        fixed = LanguageModel(network, eos_token_ids=(2,), compile=True)
    except TypeError as error:
        if re.search("Leave out compile=True|is not causal", str(error)):
            return
        raise
    for seed in range(2):
        (expected, a), (found, b) = (drawn(lm, seed) for lm in (plain, fixed))
        assert torch.equal(found, expected)
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_all_that_writes_texts_writes_the_same():
    plain, fixed = (tiny_llama(compile=compile) for compile in (False, True))
    assert_alike(plain, fixed, [0], tokens=1)  # no step
    for settings in ({"top_k": 3}, {"stop": "c d"}, {"where": torch.tensor([True, False, True])}):
        (expected, a), (found, b) = (drawn(lm, 0, **settings) for lm in (plain, fixed))
        assert torch.equal(found, expected)
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    value, _ = drawn(plain, 0)
    cut = torch.arange(value[..., 0].numel()).reshape(value.shape[:-1]) % 5
    again = []
    for lm in (plain, fixed):
        torch.manual_seed(1)
        again.append(redraw(lm(PROMPTS, 7), value, cut, copies=2))
    assert torch.equal(again[0][0], again[1][0])
    torch.testing.assert_close(again[1][1], again[0][1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(again[0][0][0], value)
    packed = fixed.packed()  # shares all, and writes by the same graph
    assert packed.compiles
    assert_alike(plain, packed, [0])
    assert_alike(plain, copy.deepcopy(fixed), [0])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("records", [False, True])
def test_resampled_texts_go_on_with_their_own_keys_and_values(records, monkeypatch):
    monkeypatch.setattr(memory, "records", lambda device: records)  # as on CUDA: padded sizes, tensors used again
    reward = rewards.get("contains", phrase="a") + rewards.Length()
    engine = SMC(9, 2, twist="partial", resampling="multinomial", ess_threshold=1.0, seed=int(records), progress=False)
    expected, found = (
        engine.run(TiltedLM(tiny_llama(compile=compile), reward, 0.5, max_new_tokens=7), ["a b c", "a"])
        for compile in (False, True)
    )
    assert expected.stats["resampled"][:, 1:5].mean() > 0.5
    np.testing.assert_array_equal(found.samples["completion"], expected.samples["completion"])
    np.testing.assert_allclose(found.log_evidence, expected.log_evidence, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_tensors_of_one_batch_serve_the_next_where_graphs_are_recorded(monkeypatch):
    monkeypatch.setattr(memory, "records", lambda device: True)
    plain, fixed = (tiny_llama(compile=compile) for compile in (False, True))
    made: list[tuple[int, ...]] = []
    step = compiled._step

    def noted(module, ids, positions, written, at, keys, values, *settings):
        made.append((keys[0].data_ptr(), *keys[0].shape))
        return step(module, ids, positions, written, at, keys, values, *settings)

    monkeypatch.setattr(compiled, "_compiled", lambda device: noted)
    with remembering():
        assert_alike(plain, fixed)
    assert {each[0] for each in made} == {made[0][0]}  # one address, whatever rows have ended
    assert {each[3] for each in made} == {memory.LENGTHS}
    rows = {each[1] for each in made}
    assert rows == {memory.recorded_rows(n) for n in rows}
    assert max(rows) == 12 > min(rows)


def test_rows_for_which_graphs_are_recorded_fit_the_memory():
    sizes = [n for n in range(1, 400) if memory.recorded_rows(n) == n]
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384]
    for n in range(1, 400):
        assert memory.recorded_rows(n) == next((size for size in sizes if size >= n), 512)
        assert memory.recorded_rows(n, most=True) == max(size for size in sizes if size <= n)
    footprint = memory.Footprint(layers=2, width=8, cached=32, inside=64, kept=128, vocabulary=10, bytes_each=4)
    for room in (2**14, 2**20, 3 * 2**20):
        batches = memory.Batches(footprint, room, 100, 30, records=True)
        assert batches.decoding in sizes
        # the prompts' own keys and values, and those of all tokens, rounded up
        held = batches.decoding * footprint.decoding(1, 100 + 192)
        assert held <= 3 * room // 4 or batches.decoding == 1


def test_networks_without_such_keys_and_values_are_refused_by_name():
    for network, reason in {
        "mamba": "other states than keys and values",
        "jamba": "other states than keys and values",
        "bart": "whole texts at every token where they are padded",
    }.items():
        own = zoo_network(network)
        with pytest.raises(TypeError, match=f"{type(own).__name__} .*{reason}.*Leave out compile=True"):
            LanguageModel(own, compile=True)
    with pytest.raises(TypeError, match=r"NGramForCausalLM .* fixed size"):
        LanguageModel(table_lm().network, compile=True)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        LanguageModel(tiny_seq2seq("t5").network, compile=True)
    lm = tiny_llama(compile=True)
    with pytest.raises(TypeError, match=re.escape("shard() is for a language model without compile=True")):
        lm.shard()


# -- the graph -----------------------------------------------------------------------------------------------


def check_one_graph(backend: str, family: str, monkeypatch) -> None:
    """One graph for a prior, and one for all its policies, whatever tokens, batches and weights."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    plain, fixed = both(network_of(family))
    counters.clear()
    assert_alike(plain, fixed, [0])
    pairs = [[lm.policy(2) for lm in (plain, fixed)] for _ in range(2)]
    drawn(pairs[0][1], 0)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_alike(plain, fixed, [1], rows=9)
        assert_alike(plain, fixed, [2], rows=1, tokens=9)
        for pair in pairs:
            for seed in range(2):
                for policy in pair:
                    changed(policy, seed)
                assert_alike(*pair, [seed], rows=4 + seed)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_one_graph(family, monkeypatch):
    check_one_graph("eager", family, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("records", [False, True])
def test_a_step_is_one_graph_of_the_compiler(records, monkeypatch):
    monkeypatch.setattr(memory, "records", lambda device: records)  # all of what CUDA gets but the recording
    check_one_graph("inductor", "llama", monkeypatch)


@pytest.mark.long
def test_policies_in_training_are_drawn_by_their_weights(monkeypatch):
    """A training that compiles is the one that does not: its draws, its losses, and its policy."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    results = []
    for compile in (False, True):
        model = TiltedLM(tiny_llama(compile=compile), rewards.get("contains", phrase="a"), max_new_tokens=4)
        engine = SVI(12, objective=ReverseKL(8), num_samples=16, num_prior_samples=0, seed=3, progress=False)
        results.append(engine.run(model, ["a b c", "a"]))
    expected, found = results
    assert found.policy.compiles
    np.testing.assert_array_equal(found.samples["completion"], expected.samples["completion"])
    np.testing.assert_allclose(found.stats["elbo"], expected.stats["elbo"], atol=1e-4)


@pytest.mark.long
def test_half_precision_is_converted_once(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    plain, fixed = (
        LanguageModel(llama_network().bfloat16(), eos_token_ids=(0,), compile=compile).policy()
        for compile in (False, True)
    )
    counters.clear()
    for seed in range(3):
        (expected, a), (found, b) = (drawn(lm, seed) for lm in (plain, fixed))
        assert (found == expected).float().mean() > 0.9  # rounded to 3 digits, some uniforms fall between
        same = (found == expected).all(-1)
        torch.testing.assert_close(b[same], a[same], atol=0.1, rtol=0.05)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
def test_a_missing_compiler_is_said(monkeypatch):
    lm = LanguageModel(llama_network(num_hidden_layers=1, hidden_size=40), compile=True)
    without = inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with without, pytest.raises(RuntimeError, match=r"needs a working C.. compiler.*CXX.*leave out compile=True"):
        lm(PROMPTS, 3).sample()


@pytest.mark.long
def test_what_makes_no_graph_is_said_by_name(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    network = llama_network(num_hidden_layers=1)
    plain = network.model.norm.forward
    network.model.norm.forward = lambda x: plain(x) if float(x.sum()) < 1e9 else x  # asks for a number
    lm = LanguageModel(network, word_tokenizer(WORDS[:8], "<eos>"), compile=True)
    with pytest.raises(RuntimeError, match=r"no graph of a decode step of LlamaModel.*Leave out compile=True"):
        lm(PROMPTS, 3).sample()
