"""Networks that are sharded over processes are refused where they would be scored or trained wrongly."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
import torch.distributed as dist
from support.models import llama_network, tiny_llama, tiny_seq2seq
from support.programs import SHORT, score_table, tilted
from support.ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, AutoPolicy, ReverseKL
from bayeslm.models import LanguageModel, TiltedLM
from bayeslm.models.lm.devices import own_device

TABLE = score_table(0, vocab=8, tokens=2)


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def no_reward(completions, **columns):
    return [0.0] * len(completions)


def attempts_with_networks():
    """What is not supported, by the words of its refusal."""
    lm = tiny_llama()
    tensor_parallel = llama_network()
    weight = tensor_parallel.lm_head.weight
    tensor_parallel.lm_head.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh(), [Shard(0)]))
    yield "is a DTensor, distributed over processes as [Shard(dim=0)]", lambda: LanguageModel(tensor_parallel)
    factor = fully_shard(llama_network(), mesh=mesh())
    factor.set_gradient_divide_factor(1.0)
    yield "set_gradient_divide_factor(1.0) changes its gradients", lambda: LanguageModel(factor)
    several = llama_network()
    fully_shard([several.model.norm, several.lm_head], mesh=mesh())
    yield "fully_shard was given several modules at once", lambda: LanguageModel(several)
    replicated = fully_shard(llama_network(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))
    yield "shard over one axis of all 2 processes", lambda: LanguageModel(replicated)
    yield (
        "of the encoder-decoder kind is not supported",
        lambda: LanguageModel(fully_shard(tiny_seq2seq("t5").network, mesh=mesh())),
    )
    half = LanguageModel(llama_network().bfloat16(), lm.tokenizer)
    yield "with a compute_dtype is not supported", half.policy().shard
    yield "cannot be trained with all weights", half.shard().policy
    lm.shard()
    yield "merging the adapters of a network that is sharded", lm.merged
    yield "packing of a network that is sharded", lm.packed
    yield "fitting of a network that is sharded", lambda: lm.fit(["a b"], num_steps=1, progress=False)
    yield "for a network without adapters", lm.policy(2).shard
    whole, drawn = tiny_llama(), torch.zeros(2, 2, dtype=torch.int64)
    for prior, policy in [(lm, lm.policy(2)), (lm, whole), (whole, lm)]:
        cut = prior(SHORT, 2, top_k=3).with_model(policy)
        yield "reads every text by two networks, and one of them is sharded", cut.sample
        yield "leave out top_k and top_p, or load the networks whole", partial(cut.log_prob, drawn)
    training = SVI(num_steps=1, guide=partial(AutoPolicy, lora_rank=2), seed=0, progress=False)
    model = TiltedLM(lm, no_reward, max_new_tokens=2, top_p=0.9)
    yield "a policy in the place of a truncated prior", lambda: training.run(model, SHORT)

    def alone(record):
        if record.step:
            SVI(num_steps=1, guide=lm.policy(), seed=0, progress=False).run(tilted(lm, TABLE), SHORT)

    engine = SVI(num_steps=1, objective=ReverseKL(2), guide=partial(AutoPolicy, lora_rank=2), callbacks=[alone])
    yield "sharded networks: one that a single process has made", lambda: engine.run(tilted(lm, TABLE), SHORT)


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


def test_what_is_not_supported_is_refused():
    def attempts(rank):
        dist.init_process_group("gloo")
        messages = []
        for words, attempt in [("'logits' is a DTensor", of_guide), *attempts_with_networks()]:
            try:
                attempt()
            except Exception as error:  # which one, the test asks
                messages.append((words, f"{type(error).__name__}: {error}"))
            else:
                messages.append((words, "nothing was refused"))
            pyro.clear_param_store()
        return messages

    for messages in launch(attempts):
        assert len(messages) == 20
        for words, message in messages:
            assert words in message, (words, message)


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
