"""Fits as people run them: tables, texts held out, micro-batches, schedules, and stopped runs that go on."""

import pandas as pd
import pytest
import torch
from support.models import table_lm, tiny_llama, tiny_seq2seq

from bayeslm.models.lm import fitting
from bayeslm.models.lm.fit_texts import split

TEXTS = ["a b a", "a c", "b b b a", "a b a c", "c c"]
QUIET = {"progress": False, "seed": 0}


def weights(lm):
    return {name: p.detach().clone() for name, p in lm.network.named_parameters()}


def assert_same(lm, other):
    for name, p in weights(other).items():
        assert torch.equal(weights(lm)[name], p), name


def stopped(monkeypatch, at, fit):
    """Run a fit that Ctrl-C stops in its step ``at``."""
    step, count = torch.optim.AdamW.step, [0]

    def interrupt(self, *args, **kwargs):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit()


MODELS = {
    "weights": lambda: tiny_llama(seed=1),
    "adapters": lambda: tiny_llama(seed=1).policy(lora_rank=2),
    "encoder-decoder": lambda: tiny_seq2seq("bart"),
}


@pytest.mark.parametrize(
    ("kind", "schedule", "held_out"),
    [("weights", "linear", 0.4), ("weights", "constant", None), ("adapters", "constant", 0.4)],
)
def test_a_stopped_fit_goes_on_bit_identically(tmp_path, monkeypatch, kind, schedule, held_out):
    settings = {"num_steps": 7, "batch_size": 2, "schedule": schedule, "held_out": held_out, "every": 2} | QUIET
    torch.manual_seed(3)  # of adapters
    whole = MODELS[kind]()
    losses = whole.fit(TEXTS, **settings)
    torch.manual_seed(3)
    stopped(monkeypatch, 6, lambda: MODELS[kind]().fit(TEXTS, checkpoint=tmp_path, **settings))
    resumed = MODELS[kind]()  # of adapters, another random half, which is no matter
    again = resumed.fit(TEXTS, checkpoint=tmp_path, **settings)
    assert (again, again.held_out) == (losses, losses.held_out)
    assert_same(resumed, whole)
    done = MODELS[kind]()
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # no further step
    assert done.fit(TEXTS, checkpoint=tmp_path, **settings) == losses
    assert_same(done, whole)


def test_adapters_that_were_trained_begin_another_fit(tmp_path):
    prior = tiny_llama()
    policy = prior.policy(lora_rank=2)
    policy.fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="weights at the start was"):
        policy.continued().fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)
    prior.policy(lora_rank=2).fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="weights at the start was"):
        prior.policy(lora_rank=3).fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)


def test_with_a_constant_rate_a_fit_may_be_made_longer(tmp_path):
    whole, shorter = tiny_llama(), tiny_llama()
    losses = whole.fit(TEXTS, num_steps=6, batch_size=2, **QUIET)
    shorter.fit(TEXTS, num_steps=4, batch_size=2, checkpoint=tmp_path, **QUIET)
    longer = tiny_llama()
    assert longer.fit(TEXTS, num_steps=6, batch_size=2, checkpoint=tmp_path, **QUIET) == losses
    assert_same(longer, whole)


@pytest.mark.parametrize(
    ("lm", "texts", "changed", "match"),
    [
        (lambda: table_lm(seed=1), TEXTS, {}, "weights at the start was"),
        (table_lm, TEXTS[1:], {}, "texts was"),
        (table_lm, TEXTS, {"learning_rate": 0.1}, r"learning_rate was 0\.001 and is 0\.1"),
        (table_lm, TEXTS, {"schedule": "linear"}, "schedule was"),
        (table_lm, TEXTS, {"held_out": ["a"]}, "texts held out was"),
    ],
)
def test_the_checkpoint_of_another_fit_is_refused(tmp_path, lm, texts, changed, match):
    table_lm().fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)
    other = lm()
    before = weights(other)
    with pytest.raises(ValueError, match=rf"checkpoint of another fit: .*{match}"):
        other.fit(texts, num_steps=2, checkpoint=tmp_path, **QUIET | changed)
    assert all(torch.equal(p, before[name]) for name, p in weights(other).items())


@pytest.mark.parametrize("name", ["tensors.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    table_lm().fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)
    file = tmp_path / "state" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        table_lm().fit(TEXTS, num_steps=2, checkpoint=tmp_path, **QUIET)


def test_the_weights_of_the_lowest_loss_held_out_are_kept():
    """A table learns texts that the other texts contradict: its loss on those rises after a while."""
    lm = table_lm(order=2, vocab=4)
    losses = lm.fit(["a b", "b b"], num_steps=40, learning_rate=0.3, held_out=["b a", "a b"], every=5, **QUIET)
    assert 0 < losses.kept_step < 40
    assert losses.held_out[losses.kept_step] == min(losses.held_out.values())
    x = lm.encode(["b a", "a b"], 3)
    own = -lm([[0], [0]], max_new_tokens=3).log_prob(x).sum() / 6  # tokens, with their ends
    assert float(own) == pytest.approx(losses.held_out[losses.kept_step], abs=1e-5)
    again = table_lm(order=2, vocab=4)
    again.fit(["a b", "b b"], num_steps=losses.kept_step, learning_rate=0.3, **QUIET)
    assert_same(lm, again)


def test_a_share_held_out_is_not_learned():
    """A table of bigrams knows of words that it has not met what it knew: their loss changes by their first word's."""
    lm, texts = table_lm(order=2, vocab=8), list("abcdefg")
    start = lm.network.table.clone()
    learned, others = split([([0], [i, 0]) for i in range(1, 8)], 0.3, seed=0)
    assert sorted(learned + others) == [([0], [i, 0]) for i in range(1, 8)]
    losses = lm.fit(texts, num_steps=1, learning_rate=0.1, held_out=0.3, **QUIET)
    own = [-(start.log_softmax(-1)[x[0], i] + start.log_softmax(-1)[i, 0]) / 2 for x, (i, _) in others]
    assert len(others) == 2
    assert losses.held_out[0] == pytest.approx(float(sum(own)) / 2, abs=1e-5)
    for share, match in [(1.5, "between 0 and 1"), (0.99, "leaves none to learn")]:
        with pytest.raises(ValueError, match=match):
            lm.fit(texts, held_out=share, **QUIET)


def test_texts_in_tables():
    prompts, answers = ["a b", "c"], ["c", "a a"]
    columns = {"prompt": prompts, "completion": answers, "source": [1, 2]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def losses(*args):
        return table_lm().fit(*args, num_steps=3, held_out=args[0] if len(args) == 1 else None, **QUIET)

    expected = losses(answers, prompts)
    for table in (columns, rows, pd.DataFrame(columns, index=[5, 7])):
        assert losses(table) == expected
    assert losses({"text": TEXTS}) == losses(TEXTS) == losses([{"text": text} for text in TEXTS])
    for table, error, match in [
        ({"question": prompts}, ValueError, "name them 'prompt' and 'completion', or 'text'"),
        ({"prompt": prompts, "completion": answers[:1]}, ValueError, "2 prompts have 1 completions"),
        (1e300, TypeError, "texts must be a list of texts, or a table of them, got 1e"),
    ]:
        with pytest.raises(error, match=match):
            losses(table)
    with pytest.raises(TypeError, match="prompts are given twice"):
        losses(columns, prompts)


@pytest.mark.parametrize("kind", ["weights", "encoder-decoder"])
def test_micro_batches_give_the_gradient_of_the_batch(kind):
    texts, prompts = ["a b c d", "b", "c c"], ["e f g", "a", "b b"]
    found = []
    for size in (None, 2):
        torch.manual_seed(3)
        lm = MODELS[kind]()
        lm.micro_batch_size = size
        found.append(lm.fit(texts, prompts, num_steps=2, held_out={"prompt": prompts, "completion": texts}, **QUIET))
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], abs=1e-4)
        assert list(losses.held_out.values()) == pytest.approx(list(found[0].held_out.values()), abs=1e-4)


def test_a_loss_that_is_not_finite_stops_the_fit(monkeypatch):
    lm, one = tiny_llama(), tiny_llama()
    one.fit(["a b"], num_steps=1, **QUIET)
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(fitting, "_loss", lambda *args, own=fitting._loss: own(*args) * next(losses))
    with pytest.raises(FloatingPointError, match="loss of step 2 is nan: lower the learning rate"):
        lm.fit(["a b"], num_steps=3, **QUIET)
    assert_same(lm, one)
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())
