"""Networks that are sharded over processes are refused where they would be scored or trained wrongly."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
import torch.distributed as dist
from support.models import llama_network, tiny_llama
from support.programs import SHORT, score_table, tilted
from support.ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from bayeslm.inference import SVI, Exact, ImportanceSampling
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.models import LanguageModel
from bayeslm.models.lm.devices import own_device

TABLE = score_table(0, vocab=8, tokens=2)


def sharded(network):
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    return network


def of_network(how):
    """An attempt with a sharded network: before or after it becomes a `LanguageModel`, and what is done with that."""
    lm = tiny_llama()
    if how == "model":
        return LanguageModel(sharded(llama_network()), lm.tokenizer)
    policy = lm.policy()
    if how == "proposal":
        sharded(policy.network)
        return ImportanceSampling(8, guide=policy, progress=False).run(tilted(lm, TABLE), SHORT)
    sharded(lm.network)
    model = tilted(lm, TABLE)
    attempts = {
        "prior": lambda: ImportanceSampling(8, seed=0, progress=False).run(model, SHORT),
        "exact": lambda: Exact().run(model, SHORT),
        "trained": lambda: SVI(num_steps=2, seed=0, progress=False).run(model, SHORT),
        "copied": lambda: lm.policy(),
        "adapters": lambda: lm.policy(2),
        "saved": lambda: lm.save_pretrained("nowhere"),
        "Pyro": lambda: pyro.poutine.trace(model).get_trace(SHORT),
    }
    return attempts[how]()


def of_guide():
    """A guide of the user's own, with a parameter that is distributed."""
    logits = torch.nn.Parameter(distribute_tensor(torch.zeros(2, 2), init_device_mesh("cpu", (2,)), [Shard(0)]))

    def guide(prompts):
        whole = pyro.param("logits", logits).full_tensor()
        with pyro.plate("prompts", 2):
            pyro.sample("topic", pyro.distributions.Categorical(logits=whole))

    def model(prompts):
        with pyro.plate("prompts", 2):
            topic = pyro.sample("topic", pyro.distributions.Categorical(torch.ones(2)))
            pyro.factor("reward", 1.0 * topic)

    engine = SVI(num_steps=2, objective=ReverseKL(4), guide=guide, optimizer=Adam(0.1), seed=0, progress=False)
    return engine.run(model, SHORT)


HOW = ["model", "proposal", "prior", "exact", "trained", "copied", "adapters", "saved", "Pyro"]


def test_sharded_networks_are_refused_everywhere():
    def attempts(rank):
        dist.init_process_group("gloo")
        messages = []
        for attempt in [*(partial(of_network, how) for how in HOW), of_guide]:
            try:
                attempt()
            except Exception as error:  # which one, the test asks
                messages.append(f"{type(error).__name__}: {error}")
            else:
                messages.append("nothing was refused")
            pyro.clear_param_store()
        return messages

    for messages in launch(attempts):
        for how, message in zip([*HOW, "guide"], messages, strict=True):
            assert "is a DTensor, distributed over processes as [Shard(dim=0)], each of which" in message, (
                how,
                message,
            )


@pytest.mark.parametrize(
    ("asked", "local", "given"),
    [("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu"), ("cuda", None, "cuda")],
)
def test_each_process_of_a_machine_has_its_own_gpu(asked, local, given, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert str(own_device(asked)) == given
    assert current == ([1] if given == "cuda:1" else [])


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: there are 2"):
        own_device("cuda")
