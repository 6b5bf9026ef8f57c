"""The card of a saved policy says what enumeration says, carries over, and can be followed."""

import ast
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import yaml
from support.models import table_lm, tiny_llama
from support.oracles import kl_to

from bayeslm.files import require_empty
from bayeslm.inference import SVI, Exact, RunError
from bayeslm.inference.training import Adam, ReverseKL
from bayeslm.model_card import CARD, FIGURE, Loading, _number, read_notes, write_card
from bayeslm.models import LanguageModel, TiltedLM, rewards
from bayeslm.posterior import Posterior

PROMPTS = ["a b", "c"]


def letters(completions, **columns):
    return [float(text.count("a")) for text in completions]


def trained(program, prompts=PROMPTS, steps=3, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi = SVI(num_steps=steps, optimizer=Adam(0.05), objective=ReverseKL(16), seed=0, progress=False, **settings)
        return svi.run(program, prompts)


def card(folder):
    return (folder / CARD).read_text()


def rows(text, first):
    """The rows of the table whose head begins with a cell, by their first cells."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {len(cells[0])}
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def settings_of(text):
    return {name: row[1] for row in re.findall(r"^\| (.*?) \| (.*?) \|$", text, re.M) for name in (row[0],)}


# -- what it says ----------------------------------------------------------------------------------------------


def test_figures_are_those_of_enumeration(tmp_path):
    program = TiltedLM(table_lm(vocab=4), rewards.Reward(letters), beta=0.7, max_new_tokens=3)
    exact = Exact().run(program, PROMPTS)
    posterior = trained(program, steps=15, num_samples=1500)
    posterior.save(tmp_path / "run")
    table = rows(card(tmp_path / "run" / "policy"), "prompt")
    gap = kl_to(exact, posterior.policy, PROMPTS).numpy()
    log_z = exact.log_evidence
    x = torch.as_tensor(exact.samples["completion"][0])
    with torch.no_grad():
        log_q, log_p = (lm(PROMPTS, 3).log_prob(x).double() for lm in (posterior.policy, program.prior))
    right = {
        "reward of the prior": (log_p.exp() * torch.as_tensor(exact.rewards["reward"][0])).sum(0).numpy(),
        "reward of the policy": (log_q.exp() * torch.as_tensor(exact.rewards["reward"][0])).sum(0).numpy(),
        "log Z": log_z,
        "ELBO": log_z - gap,
        "KL to the prior": (log_q.exp() * (log_q - log_p)).sum(0).numpy(),
        "KL to the posterior": gap,
    }
    assert list(table) == PROMPTS
    for i, prompt in enumerate(PROMPTS):
        for name, values in right.items():
            value, error = map(float, table[prompt][name].split(" ± "))
            assert abs(value - values[i]) < 5 * error + 1e-3, (prompt, name)
            assert 0 < error < 0.2


def test_what_was_run_is_said(tmp_path):
    program = TiltedLM(table_lm(), rewards.Reward(letters), beta=0.7, max_new_tokens=3, temperature=0.9)
    posterior = trained(program)
    posterior.save(tmp_path / "run")
    found = settings_of(card(tmp_path / "run" / "policy"))
    expected = {"prior": "NGramForCausalLM", "program": "TiltedLM", "β": "0.7", "temperature": "0.9", "prompts": "2"}
    assert expected.items() <= found.items()
    assert found["reward"] == "Reward(letters)"
    assert found["objective"].startswith("ReverseKL(")
    assert found["optimizer"].startswith("Adam(")
    assert found["gradient steps"].startswith("3; ")
    assert f"torch {torch.__version__}" in found["trained with"]


def own_program(factor):
    lm = table_lm()

    def model(prompts, strength=0.25):
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", lm(prompts, max_new_tokens=2))
            factor(torch.tensor(np.vectorize(lambda t: float(t.count("a")))(lm.decode(x))), strength)

    return model


def recorded(r, strength):
    rewards.factor("letters", r, strength)


def not_recorded(r, strength):
    pyro.factor("letters", r / strength)


@pytest.mark.parametrize(
    ("factor", "reward", "beta"), [(recorded, "letters", "0.25"), (not_recorded, "not recorded", "not known")]
)
def test_the_reward_and_beta_of_a_program_of_ones_own(tmp_path, factor, reward, beta):
    trained(own_program(factor)).policy.save_pretrained(tmp_path / "policy")
    text = card(tmp_path / "policy")
    found = settings_of(text)
    assert (found["program"], found["strength"]) == ("model", "0.25")
    assert found["reward"].startswith(reward)
    assert found["β"].startswith(beta)
    measure = "reward" if factor is recorded else "log-likelihood"
    assert f"{measure} of the policy" in rows(text, "prompt")["a b"]


def test_many_prompts_have_a_row_of_means(tmp_path):
    program = TiltedLM(table_lm(), rewards.Reward(letters), max_new_tokens=2)
    prompts = [f"{x} {y}" for x in "abcde" for y in "abcde"]
    trained(program, prompts, num_samples=8).policy.save_pretrained(tmp_path)
    table = rows(card(tmp_path), "prompt")
    assert len(table) == 21
    assert list(table)[-1] == "and 5 more: the mean of all"
    assert all(re.fullmatch(r"-?\d+\.\d{3} ± \d+\.\d{3}", cell) for cell in list(table[list(table)[-1]].values())[1:])


@pytest.mark.parametrize(("value", "shown"), [(-np.inf, "−∞"), (np.inf, "∞"), (np.nan, "–"), (1.0, "1.000")])
def test_an_infinite_figure_is_no_unknown_one(value, shown):
    assert _number({"log_evidence": value}, "log_evidence") == shown


HOSTILE = ["a | b", "a\n\nb", "`a`", "<!-- end of training -->", "<script>a</script>", "[a](http://b)", "\x1b[2J a"]


def test_no_text_breaks_out_of_the_card(tmp_path, pictures):
    program = TiltedLM(table_lm(), rewards.Reward(letters), max_new_tokens=2)
    posterior = trained(program, ["a"] * len(HOSTILE))
    posterior.prompts[:] = HOSTILE
    posterior.policy.save_pretrained(tmp_path)
    text = card(tmp_path)
    assert len(rows(text, "prompt")) == len(HOSTILE)
    assert text.count("<!--") == 3
    assert not re.search(r"<script|\]\(http|\x1b|\| `", text)
    assert read_notes(tmp_path).text.endswith(f"({FIGURE})")


# -- where it goes ---------------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path):
    """A policy with adapters on a base that is a folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    lm = LanguageModel.from_pretrained(tmp_path / "base")
    return trained(TiltedLM(lm, rewards.Reward(letters), max_new_tokens=3), num_samples=16).policy


def test_what_is_said_of_a_training_goes_with_the_policy(pictures, policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    notes = read_notes(tmp_path / "policy")
    assert notes.figure.startswith(b"\x89PNG")
    assert notes.settings == {"temperature": 1.0, "max_new_tokens": 3}
    loaded = LanguageModel.from_pretrained(tmp_path / "policy")
    loaded.merged().save_pretrained(tmp_path / "merged")
    LanguageModel.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "again")
    assert [read_notes(tmp_path / name) for name in ("merged", "again")] == [notes, notes]
    assert "AutoPeftModelForCausalLM" not in card(tmp_path / "merged")
    loaded.policy().save_pretrained(tmp_path / "new")  # a training that begins from it is another
    assert read_notes(tmp_path / "new") is None
    assert not (tmp_path / "new" / FIGURE).exists()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_of_a_card_runs_in_its_folder(policy, tmp_path, monkeypatch, kind, capsys):
    policy = policy if kind == "adapter" else policy.merged()
    policy.save_pretrained(tmp_path / kind)
    monkeypatch.chdir(tmp_path / kind)
    (code,) = re.findall(r"```python\n(.*?)```", card(tmp_path / kind), re.S)
    names = {}
    exec(code.replace("Hello", "a b"), names)
    assert capsys.readouterr().out.startswith("a b")
    assert names["tokens"].shape[-1] <= 2 + 3
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        found, expected = (network(input_ids=ids).logits for network in (names["model"], policy.network))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_card_without_a_tokenizer_generates_from_ids(tmp_path, monkeypatch, kind, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    lm = LanguageModel.from_pretrained(tmp_path / "base")
    lm.tokenizer = None
    saved = lm.policy(2) if kind == "adapter" else lm
    saved.save_pretrained(tmp_path / kind)
    monkeypatch.chdir(tmp_path / kind)
    text = card(tmp_path / kind)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("max_new_tokens=128", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.startswith("[1, 2, 3")
    assert "--skip-tokenizer-init" in text
    assert "bayeslm sample" not in text
    assert LanguageModel.from_pretrained(".")(torch.tensor([[1, 2, 3]]), 2).sample().shape[-1] == 2


@pytest.mark.parametrize(
    ("base", "argument"),
    [
        ("/a b; echo x", "/a b; echo x"),
        ("/a'b$(x)`y`", "/a'b$(x)`y`"),
        ("someone/tiny", "someone/tiny"),
        *((x, "BASE") for x in ("/a\nrm -r b", "/a\x1b[2J", "/a\u202eb", "/a\tb", "--x", "")),
    ],
)
def test_the_command_of_a_card_is_one_command_with_the_base_as_one_argument(tmp_path, base, argument):
    write_card(tmp_path, Loading(base, None, "float32", None, 8), None)
    (line,) = [line for line in card(tmp_path).splitlines() if line.startswith("    vllm ")]
    assert shlex.split(line)[:4] == ["vllm", "serve", argument, "--dtype"]
    assert not [line for line in card(tmp_path).splitlines() if line.startswith("rm ")]


def test_a_relative_folder_is_not_named_as_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/base").mkdir(parents=True)
    for base in ("runs/base", "../base", "./base"):
        write_card(tmp_path, Loading(base, None, "float32", None, 8), None)
        assert "base_model" not in yaml.safe_load(card(tmp_path).split("---\n")[1])


def test_a_card_of_ones_own_stays_and_one_of_ours_is_renewed(pictures, policy, tmp_path):
    prior = tiny_llama()
    prior.save_pretrained(tmp_path / "model")
    assert "## Training" not in card(tmp_path / "model")
    policy.merged().save_pretrained(tmp_path / "model")
    assert "## Training" in card(tmp_path / "model")
    prior.save_pretrained(tmp_path / "model")
    assert "## Training" not in card(tmp_path / "model")
    assert not (tmp_path / "model" / FIGURE).exists()
    (tmp_path / "model" / CARD).write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LanguageModel.from_pretrained(tmp_path / "model")
    policy.merged().save_pretrained(tmp_path / "model")
    assert card(tmp_path / "model") == "mine"


def test_a_card_says_with_which_strings_texts_end(tmp_path):
    """In code that generates them, and after a new saving; nothing in them leaves the place it is in."""
    stop = ("a b", "--> \"'`|", "\n")
    program = TiltedLM(table_lm(vocab=4), rewards.Reward(letters), beta=0.7, max_new_tokens=3, stop=stop)
    trained(program).policy.save_pretrained(tmp_path)
    policy = LanguageModel.from_pretrained(tmp_path)
    assert policy.provenance.settings["stop"] == list(stop)
    policy.save_pretrained(tmp_path / "again")
    (line,) = [line for line in card(tmp_path / "again").splitlines() if "model.generate(" in line]
    calls = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    (strings,) = [key.value for call in calls for key in call.keywords if key.arg == "stop_strings"]
    assert ast.literal_eval(strings) == list(stop)
    assert settings_of(card(tmp_path))["stop"]


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"<!-- training {} -->", b'<!-- training {"a": []} -->\nx<!-- end of training -->']
)
def test_a_damaged_card_says_nothing(tmp_path, text):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / CARD).write_bytes(text)
    assert LanguageModel.from_pretrained(tmp_path).provenance is None


@pytest.mark.parametrize(
    ("loading", "base"),
    [
        (Loading("someone/tiny", None, "float32", None, 8), "someone/tiny"),
        (Loading("/root/.cache/x", "smollm2", "float32", None, 8), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (Loading("/home/me/model", None, "float32", None, 8), None),  # which the hub refuses
        (Loading("", None, "float32", None, 8), None),
        (Loading(None, None, "bfloat16", "bfloat16", None), None),
    ],
)
def test_the_hub_reads_the_front_matter(tmp_path, loading, base):
    require_empty(tmp_path)
    write_card(tmp_path, loading, None)
    front = yaml.safe_load(card(tmp_path).split("---\n")[1])
    assert front.get("base_model") == base
    assert front["library_name"] == ("transformers" if loading.base is None else "peft")
    assert ("4-bit GGUF" in card(tmp_path)) == (loading.short_name == "smollm2")


def test_a_posterior_that_was_loaded_has_a_policy_with_its_card(pictures, policy, tmp_path):
    policy.provenance.save(tmp_path / "run")
    loaded = LanguageModel.from_pretrained(Posterior.load(tmp_path / "run").policy_path)
    assert loaded.provenance == read_notes(tmp_path / "run" / "policy")


def test_the_card_of_a_stopped_training_says_what_is_known(tmp_path):
    """An error in the third step: no draws of the policy have judged it."""
    calls = []

    def reward(completions, **columns):
        calls.append(1)
        if len(calls) > 4:
            raise OSError("the judge is asleep")
        return letters(completions)

    with pytest.raises(RunError) as caught:
        trained(TiltedLM(table_lm(order=2, seed=0, vocab=4), reward, 0.7, max_new_tokens=3), steps=9)
    policy, step = caught.value.so_far.policy, caught.value.so_far.step
    policy.save_pretrained(tmp_path / "policy")
    text = card(tmp_path / "policy")
    assert f"| gradient steps | {step}, after which the training was stopped" in text
    assert re.search(r"\| ELBO in the last step \| -?\d", text)
    assert "| beta | 0.7 |" in text
    assert read_notes(tmp_path / "policy").settings["max_new_tokens"] == 3
