"""Trainings that begin as a policy that is there already."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pytest
import torch
from support.models import table_lm, tiny_llama
from support.programs import PROMPTS, TOKENS, score_table, tilted

from bayeslm.inference import SVI, ProgramError
from bayeslm.inference.program import inspect
from bayeslm.inference.training import Adam, AutoPolicy, StepRecord
from bayeslm.models import LanguageModel
from bayeslm.models.lm import adapters

SETTINGS = {"num_particles": 32, "optimizer": Adam(0.03), "num_samples": 4, "seed": 0, "progress": False}
KINDS = {"a table": (lambda: table_lm(order=3, seed=1), None), "adapters": (lambda: tiny_llama(seed=1), 2)}


@pytest.fixture(params=KINDS)
def problem(request):
    make, rank = KINDS[request.param]
    prior = make()
    model = tilted(prior, score_table(1), 0.5)
    return (
        prior,
        model,
        SVI(num_steps=40, guide=partial(AutoPolicy, lora_rank=rank), **SETTINGS).run(model, PROMPTS).policy,
    )


def weights(lm: LanguageModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lm.parameters()]


def test_it_begins_as_the_policy_and_goes_on(problem):
    """Bit-identically; twice as many steps lead nearer. The policy that was given stays as it is."""
    prior, model, start = problem
    before = weights(start)
    begun = AutoPolicy(inspect(model, PROMPTS), start=start).policy
    x = prior(PROMPTS, TOKENS).sample((50,))
    with torch.no_grad():
        assert torch.equal(begun(PROMPTS, TOKENS).log_prob(x), start(PROMPTS, TOKENS).log_prob(x))
    cold = SVI(num_steps=8, **SETTINGS).run(model, PROMPTS)
    gently = SETTINGS | {"optimizer": Adam(0.003)}  # at a rate that leads away the first policy would be returned
    warm = SVI(num_steps=8, guide=start, num_chains=2, **gently).run(model, PROMPTS)
    assert (warm.stats["elbo"][:, :5].mean((1, 2)) > cold.stats["elbo"][0, :5].mean() + 0.1).all()
    for p, q in zip(start.parameters(), before, strict=True):
        assert torch.equal(p, q)
    moved = [not torch.equal(p, q) for p, q in zip(warm.policy.parameters(), before, strict=True)]
    assert any(moved)
    assert (warm.stats["elbo"][0] != warm.stats["elbo"][1]).any()


def test_weights_under_adapters_are_one_copy(tmp_path):
    prior = tiny_llama(seed=1)
    model = tilted(prior, score_table(1), 0.5)
    first = SVI(num_steps=2, guide=partial(AutoPolicy, lora_rank=2), **SETTINGS).run(model, PROMPTS).policy
    first.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path, base=prior)
    second = SVI(num_steps=2, guide=loaded, **SETTINGS).run(model, PROMPTS).policy
    held = {p.data_ptr() for p in prior.parameters()}
    own = adapters.own_parameters(second.network)
    assert {p.data_ptr() for p in second.parameters()} - held == {p.data_ptr() for p in own}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in own)
    assert not held & {p.data_ptr() for p in own}
    assert not {p.data_ptr() for p in adapters.own_parameters(loaded.network)} & {p.data_ptr() for p in own}
    assert second.network.peft_config["default"].r == 2


def test_adapters_of_bfloat16_weights_go_on_in_float32():
    prior = LanguageModel(tiny_llama(seed=1).network.bfloat16())
    start = prior.policy(2).bfloat16()
    own = adapters.own_parameters(start.continued().network)
    assert all(p.dtype == torch.float32 for p in own)


def test_other_latents_begin_as_ever():
    lm = table_lm(order=3, seed=1)

    def model(prompts):
        with pyro.plate("prompts", len(prompts)):
            level = pyro.sample("level", pyro.distributions.Normal(0.0, 1.0))
            x = pyro.sample("completion", lm(prompts, max_new_tokens=3))
            pyro.factor("reward", level * (x[..., 0] == 1))

    warm = SVI(num_steps=3, guide=lm.policy(), **SETTINGS).run(model, PROMPTS)
    assert warm.samples["level"].shape == (1, 4, 2)


def test_a_checkpoint_knows_what_it_began_as(tmp_path):
    lm = table_lm(order=3, seed=1)
    model = tilted(lm, score_table(1), 0.5)
    start = SVI(num_steps=3, **SETTINGS).run(model, PROMPTS).policy
    whole = SVI(num_steps=4, guide=start, checkpoint=tmp_path, **SETTINGS).run(model, PROMPTS)
    again = SVI(num_steps=4, guide=start, checkpoint=tmp_path, **SETTINGS).run(model, PROMPTS)
    assert np.array_equal(whole.samples["completion"], again.samples["completion"])
    with pytest.raises(ValueError, match="guide: network was"):
        SVI(num_steps=4, guide=lm, checkpoint=tmp_path, **SETTINGS).run(model, PROMPTS)


def test_what_cannot_be_begun_with():
    prior = tiny_llama(seed=1)
    model = tilted(prior, score_table(1), 0.5)
    with pytest.raises(ValueError, match="has adapters, which keep their rank: leave out lora_rank"):
        SVI(num_steps=1, guide=partial(AutoPolicy, lora_rank=4, start=prior.policy(2)), **SETTINGS).run(model, PROMPTS)
    with pytest.raises(ValueError, match=r"vocabularies differ, Vocabulary\(size=8, .* and Vocabulary\(size=12, "):
        SVI(num_steps=1, guide=table_lm(vocab=12), **SETTINGS).run(model, PROMPTS)
    other = table_lm()

    def two(prompts):
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("one", prior(prompts, max_new_tokens=2))
            pyro.sample("two", other(prompts, max_new_tokens=2))

    with pytest.raises(ProgramError, match="has 2 language models, and a policy to begin with stands for one"):
        SVI(num_steps=1, guide=other, **SETTINGS).run(two, PROMPTS)
    with pytest.raises(TypeError, match="packed model can be neither trained"):
        SVI(num_steps=1, guide=prior.packed(), **SETTINGS).run(model, PROMPTS)


@pytest.mark.parametrize(("rank", "rate"), [(None, 1e-3), (2, 3e-4)])
def test_adapters_have_a_lower_learning_rate(rank, rate):
    seen: list[float] = []
    model = tilted(tiny_llama(seed=1), score_table(1), 0.5)
    guide = partial(AutoPolicy, lora_rank=rank)

    def note(record: StepRecord) -> None:
        seen.extend([record.figures["learning_rate"]] if record.step else [])

    for optimizer in (Adam(), Adam(0.01)):
        SVI(num_steps=2, guide=guide, callbacks=[note], **SETTINGS | {"optimizer": optimizer}).run(model, PROMPTS)
    assert seen == pytest.approx([rate, rate / 2, 0.01, 0.005])


@pytest.mark.parametrize(("settings", "layers"), [({}, [0, 1]), ({"lora_layers": 0.5}, [1])])
def test_which_layers_a_guide_adapts(tmp_path, settings, layers):
    tiny_llama(seed=1).save_pretrained(tmp_path)
    model = tilted(LanguageModel.from_pretrained(tmp_path), score_table(1), 0.5)
    guide = AutoPolicy(inspect(model, PROMPTS), **settings)
    names = [name for name, p in guide.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in names)
    assert sorted({int(name.partition(".layers.")[2].partition(".")[0]) for name in names}) == layers
