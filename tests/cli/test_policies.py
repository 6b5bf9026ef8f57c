"""`bayeslm sample` and `bayeslm export`: from a trained policy to its texts, and to a folder for other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.models import tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bayeslm.cli import app
from bayeslm.models import LanguageModel
from bayeslm.models.lm import SampledText
from bayeslm.visible import visible

MODULES: dict[str, str] = {}
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def policy(folder: Path) -> LanguageModel:
    """A trained policy, where `infer --engine svi --out runs/x` puts it; its base is the folder ``model``."""
    lm = LanguageModel.from_pretrained("model", eos_token_ids=(0,))
    lm.tokenizer.chat_template = "{% for message in messages %}{{ message.content }} a {% endfor %}"
    policy = lm.policy(2)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    policy.save_pretrained("runs/x/svi/policy")
    return policy


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 else result.output


def sample(*arguments: str) -> list[dict]:
    return [json.loads(line) for line in run("sample", *arguments, "--max-new-tokens", "5").splitlines()]


# -- sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"temperature": 2.0}, {"top_k": 5, "stop": ["b", "c"]}, {"top_p": 0.8}], ids=lambda x: "-".join(x)
)
def test_texts_as_json_lines_with_the_policys_own_log_probabilities(policy: LanguageModel, settings) -> None:
    flags = [
        word
        for name, values in settings.items()
        for value in (values if isinstance(values, list) else [values])
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    rows = sample("runs/x", "a b", "c", "--num", "3", "--seed", "1", *flags)
    assert [row["prompt"] for row in rows] == ["a b"] * 3 + ["c"] * 3
    stops = settings.get("stop", [])
    assert not stops or any(word in stops for row in rows for word in row["completion"].split())
    for row in rows:
        words = row["completion"].split()
        stopped = [word in stops for word in words]
        assert not any(stopped[:-1])  # nothing follows a stop string
        assert row["ended"] or len(words) == 5
        assert row["tokens"] == len(words) + (row["ended"] and not any(stopped))
        x = torch.tensor([([policy.tokenizer.convert_tokens_to_ids(word) for word in words] + [0] * 5)[:5]])
        expected = policy([row["prompt"]], 5, **settings).log_prob(x).item()
        assert row["log_prob"] == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_texts_whatever_the_prompts_before_and_wherever_they_go(policy: LanguageModel) -> None:
    rows = sample("runs/x", "a b", "c", "--num", "2", "--seed", "1")
    assert sample("runs/x", "e f g", "c", "--num", "2", "--seed", "1")[2:] == rows[2:]
    assert sample("runs/x", "a b", "c", "--num", "2", "--seed", "2") != rows
    twice = sample("runs/x", "c", "c", "--num", "4", "--seed", "1")  # texts of their own
    assert [row["log_prob"] for row in twice[:4]] != [row["log_prob"] for row in twice[4:]]
    text = run("sample", "runs/x", "a b", "c", "--num", "2", "--seed", "1", "--text", "--max-new-tokens", "5")
    of_prompts = [
        f"{prompt}\n" + "\n---\n".join(r["completion"] + " …" * (not r["ended"]) for r in rows if r["prompt"] == prompt)
        for prompt in ("a b", "c")
    ]
    assert text == "\n\n".join(of_prompts) + "\n\n"


@pytest.mark.parametrize("place", ["runs/x", "runs/x/svi", "runs/x/svi/policy", "model"])
def test_a_policy_is_found_in_what_a_user_points_at(policy: LanguageModel, place: str) -> None:
    rows = sample(place, "a b", "--seed", "0")
    lm = LanguageModel.from_pretrained("model") if place == "model" else policy
    ids = [lm.tokenizer.convert_tokens_to_ids(word) for word in rows[0]["completion"].split()]
    expected = lm(["a b"], 5).log_prob(torch.tensor([(ids + [0] * 5)[:5]])).item()
    assert rows[0]["log_prob"] == pytest.approx(expected, abs=1e-4)


def test_several_policies_are_not_chosen_from_silently(policy: LanguageModel, folder: Path) -> None:
    """What `infer --engine "svi, adaptive"` writes; a folder that is a model itself is that model."""
    assert "policy: runs/x/svi/policy" in CliRunner().invoke(app, ["export", "runs/x", "one"]).stderr
    assert "policy:" not in CliRunner().invoke(app, ["export", "runs/x/svi/policy", "direct"]).stderr
    shutil.copytree("runs/x/svi/policy", "runs/x/adaptive/policy")
    for command in (["sample", "runs/x", "a"], ["export", "runs/x", "new"]):
        output = run(*command, code=2)
        assert "runs/x holds 2 policies: choose one of runs/x/svi/policy, runs/x/adaptive/policy" in output
    assert not (folder / "new").exists()
    run("export", "runs/x/adaptive", "other")
    shutil.copytree("runs/x/svi/policy", "model/policy")
    assert "policy:" not in CliRunner().invoke(app, ["export", "model", "copy"]).stderr


def test_chats_and_files_of_prompts(policy: LanguageModel, folder: Path) -> None:
    (folder / "prompts.jsonl").write_text('{"prompt": "b", "answer": 3}\n{"prompt": "c", "answer": 4}\n')
    rows = sample("runs/x", "--prompts", "prompts.jsonl", "--chat", "--seed", "0")
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in "bc"]
    assert rows == sample("runs/x", "--chat", "b", "c", "--seed", "0")
    plain = sample("runs/x", "b a", "c a", "--seed", "0")  # as the template writes these chats
    assert [row["completion"] for row in plain] == [row["completion"] for row in rows]


def test_an_adapter_around_another_prior(policy: LanguageModel, folder: Path) -> None:
    tiny_llama(seed=5, scale=1.0).save_pretrained(folder / "other")
    rows = sample("runs/x", "a b", "--seed", "0", "--prior", "other")
    assert rows != sample("runs/x", "a b", "--seed", "0")
    run("export", "runs/x", "moved", "--prior", "other")
    assert sample("moved", "a b", "--seed", "0") == rows
    named = json.loads((folder / "moved" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder / "other")


def test_a_text_of_no_probability_is_valid_json_and_escapes_are_shown_wherever_pieces_end(
    policy: LanguageModel, monkeypatch
) -> None:
    text = "a \x1b[2J\x1b]0;b\x07 \u202ec \U0001f642"

    def drawn(lm, prompts, num, on_text=None, **settings):
        for piece in text if on_text is not None else ():
            on_text(piece)
        return [[SampledText(text, float("-inf"), 3, True)]]

    monkeypatch.setattr("bayeslm.models.lm.sample_texts", drawn)
    (line,) = run("sample", "model", "b", "--max-new-tokens", "5").splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["log_prob"], row["completion"]) == (None, text)
    assert run("sample", "model", "b", "--text", "--max-new-tokens", "5") == f"b\n{visible(text)}\n\n"
    assert visible(text).startswith(r"a \x1b[2J\x1b]0;b\x07 \u202ec ")


# -- export ----------------------------------------------------------------------------------------------------


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def test_an_export_is_the_policy_in_peft_and_in_transformers(policy: LanguageModel, folder: Path, monkeypatch) -> None:
    run("export", "runs/x", "adapter")
    run("export", "runs/x", "merged", "--merge")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    expected = logits(policy.network)
    assert (expected - logits(tiny_llama(scale=1.0).network)).abs().max() > 0.1
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_an_export_in_another_dtype(policy: LanguageModel, folder: Path) -> None:
    run("export", "runs/x", "half", "--merge", "--dtype", "bfloat16")
    run("export", "model", "copy", "--dtype", "float16")
    for name, dtype in (("half", torch.bfloat16), ("copy", torch.float16)):
        network = AutoModelForCausalLM.from_pretrained(folder / name)
        assert network.dtype == dtype
    expected = policy.merged(torch.bfloat16).network.state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "half").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["export", "runs/x", "model"], "model exists and is not empty: choose another folder"),
        (["export", "runs/x", "new", "--dtype", "float16"], "--dtype is of a whole model's weights: add --merge"),
        (
            ["export", "runs/x", "new", "--merge", "--dtype", "int8"],
            "Invalid value for '--dtype': Value error, 'int8' is not one of",
        ),
        (["export", "runs", "new"], "runs holds no policy: neither config.json nor adapter_config.json"),
        (["sample", "runs", "a"], "runs holds no policy"),
        (["sample", "nowhere/x", "a"], "no model 'nowhere/x'"),
        (["sample", "model"], "no prompts: give at least one"),
        (["sample", "model", "a", "--max-new-tokens", "64"], "context has room for 0 before max_new_tokens"),
        (["sample", "model", "a", "--temperature", "0", "--max-new-tokens", "5"], "Invalid value for '--temperature'"),
        (["sample", "model", "a", "--chat"], "has no chat template"),
        (["sample", "model", "a", "--prior", "model"], "holds none"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(policy: LanguageModel, folder: Path, arguments, match) -> None:
    usage = match.startswith(("--", "no prompts", "Invalid"))
    output = " ".join(run(*arguments, code=2 if usage else 1).split())
    assert match in output
    assert "unexpected" not in output
    assert not (folder / "new").exists()
