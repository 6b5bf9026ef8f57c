"""Networks that `fully_shard` has sharded are drawn from, scored, trained, checkpointed and saved as whole ones."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor  # before the forks, as the next
import transformers
from support.models import llama_network, tiny_llama
from support.programs import SHORT, score_table, tilted
from support.ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bayeslm.inference import MCMC, SMC, SVI, AnnealedSMC, ImportanceSampling
from bayeslm.inference.training import (
    Adam,
    AutoPolicy,
    Checkpointing,
    ForwardKL,
    LogVariance,
    Replay,
    ReverseKL,
    TrustRegion,
)
from bayeslm.models import LanguageModel

TABLE = score_table(0, vocab=8, tokens=3)
FAST = partial(
    SVI, objective=ForwardKL(5), optimizer=Adam(1e-4), num_samples=4, num_prior_samples=0, seed=0, progress=False
)
LORA = partial(AutoPolicy, lora_rank=2)


def whole(**settings):
    lm = tiny_llama(**settings)
    lm.network.double()
    return lm


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What engines import when they first run is imported before the forks."""
    FAST(num_steps=1, guide=LORA).run(tilted(whole(), TABLE), SHORT)


SETTINGS = {
    "ours, of few rows a pass": {"batch_size": 4, "micro_batch_size": 4},
    "ours, checkpointed": {"gradient_checkpointing": True},
}


def sharded(how):
    """A network sharded by us, or by a user in one of several ways."""
    if how in SETTINGS:
        return whole(**SETTINGS[how]).shard()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    network, mesh = llama_network().double(), init_device_mesh("cpu", (dist.get_world_size(),))
    again = {"reshard_after_forward": True} if how == "gathered again" else {}
    for layer in network.model.layers if how != "one unit" else ():
        if how == "nested":
            fully_shard(layer.mlp, mesh=mesh)
        fully_shard(layer, mesh=mesh, **again)
    if how in ("roots", "nested"):
        fully_shard(network.model, mesh=mesh)
        fully_shard(network.lm_head, mesh=mesh)
    if how not in ("roots", "layers alone"):
        fully_shard(network, mesh=mesh, **again)
    return LanguageModel(network, tiny_llama().tokenizer)


def in_float64():
    """Compute scores in float64 in this process: Adam moves weights without a gradient by its rounding alone."""
    single = torch.Tensor.float
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else single(x)


def weights(lm):
    """Those that are trained, put together."""
    found = [x.detach() for x in lm.parameters() if x.requires_grad]
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).numpy() for x in found]


def trained(engine, lm):
    posterior = engine.run(tilted(lm, TABLE), SHORT)
    return posterior.samples["completion"], posterior.stats["elbo"], weights(posterior.policy), posterior.log_weights


def assert_same(engine, one, other):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], atol=5e-5)  # log-probabilities are float32
    np.testing.assert_allclose(one[3], other[3], atol=5e-5)
    assert len(one[2]) == len(other[2]) > 10
    for x, y in zip(one[2], other[2], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


WAYS = [*SETTINGS, "gathered again", "roots", "nested", "layers alone"]


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.long] if i else []) for i, how in enumerate([*WAYS, "one unit"])]
)
def test_steps_are_those_of_the_whole_network(how):
    """The ranks have 2 and 3 particles, and their completions end at other lengths."""
    if how == WAYS[0]:
        engines = {"all weights": FAST(num_steps=5), "adapters": FAST(num_steps=2, guide=LORA)}
    else:
        engines = {"all weights": FAST(num_steps=10), "adapters": FAST(num_steps=3, guide=LORA)}
        region = partial(FAST, num_steps=10, optimizer=TrustRegion())
        engines |= {
            "region": region(objective=ReverseKL(5)),
            "kept draws": region(objective=LogVariance(8, Replay(32, every=2))),
        }

    def run(rank):
        in_float64()
        lms = (whole(**SETTINGS.get(how, {})), sharded(how))
        return [{x: trained(engine, lm) for x, engine in engines.items()} for lm in lms], weights(whole().policy())

    for (of_whole, of_parts), prior in launch(run):
        for name, engine in engines.items():
            assert_same(engine, of_whole[name], of_parts[name])
        # (An objective that raises the ELBO would go back to the first weights, where these steps are no better.)
        moved = [np.abs(x - y).max() for x, y in zip(of_parts["all weights"][2], prior, strict=True)]
        assert min(moved) > 1e-4, moved


@pytest.mark.long
def test_engines_draw_what_they_draw_of_the_whole_network():
    engines = [
        ImportanceSampling(5, seed=0, progress=False),
        SMC(4, num_chains=3, seed=0, progress=False),
        MCMC(num_samples=3, num_chains=3, warmup=2, seed=0, progress=False),
        AnnealedSMC(4, num_chains=2, seed=0, progress=False),
    ]

    def run(rank):
        found = []
        for lm in (whole(batch_size=2), whole(batch_size=2).shard()):
            results = [engine.run(tilted(lm, TABLE), SHORT) for engine in engines]
            found.append([(x.samples["completion"], x.log_weights) for x in results])
        return found

    for of_whole, of_parts in launch(run):
        for engine, (x, w), (y, v) in zip(engines, of_whole, of_parts, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=str(engine))
            np.testing.assert_allclose(w, v, atol=5e-5)


@pytest.mark.long
def test_it_is_resumed_by_other_numbers_of_processes_and_saved_as_an_ordinary_network(tmp_path):
    engine = partial(FAST, optimizer=TrustRegion(), checkpoint=Checkpointing(tmp_path / "run", every=2))

    def begin(rank):
        posterior = engine(num_steps=4).run(tilted(sharded("roots"), TABLE), SHORT)
        posterior.policy.save_pretrained(tmp_path / "saved")  # on both: each has a part
        return weights(posterior.policy), posterior.stats["elbo"]

    (begun, elbo), _ = launch(begin)

    def resume(rank):
        posterior = engine(num_steps=4).run(tilted(sharded("roots"), TABLE), SHORT)
        found = weights(posterior.policy)
        return found, engine(num_steps=6).run(tilted(sharded("roots"), TABLE), SHORT).stats["elbo"]

    for found, more in launch(resume, size=3):
        for x, y in zip(begun, found, strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(more[:, :4], elbo)
        assert more.shape == (1, 6, 2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert type(loaded) is transformers.LlamaForCausalLM
    for x, y in zip(begun, loaded.parameters(), strict=True):
        np.testing.assert_array_equal(x, y.detach())
