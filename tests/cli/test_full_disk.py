"""A disk that is full at the end of a run: what the run has cost is not lost, and the error says where it is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.disks import full_disk
from support.models import table_lm, tiny_llama
from support.toys import from_prior
from typer.testing import CliRunner

from bayeslm.cli import app, comparison, resume
from bayeslm.models import LanguageModel
from bayeslm.models.preferences import Comparisons
from bayeslm.posterior import Posterior

REWARDS = "def letters(completions, **kwargs):\n    return [float(text.count('a')) for text in completions]\n"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the system."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path / "disk")]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no command mount")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_trained_policy_survives_its_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit lets the adapters with their picture pass, and not the arrays of the posterior."""
    tiny_llama(scale=1.0).save_pretrained(tmp_path / "model")
    (tmp_path / "my_full_disk_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    train = ["--engine", "svi(num_steps=2, num_particles=4, num_samples=8, guide=AutoPolicy(lora_rank=1))"]
    options = ["--prior", "model", "--reward", "my_full_disk_rewards:letters", "--max-new-tokens", "3", *train]
    with full_disk(100_000):
        result = CliRunner().invoke(app, ["infer", "a b", *options, "--out", "run"])
    text = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "svi could not be written: File too large" in text
    assert "the trained weights of svi are in run/svi-policy-so-far instead" in text
    assert "svi: policy" in text  # the comparison
    prior = LanguageModel.from_pretrained("model")
    policy = LanguageModel.from_pretrained("run/svi-policy-so-far", base=prior)
    assert policy.has_adapters
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "call.json",
        "run.yaml",
        "svi-policy-so-far",
    ]


def test_results_go_to_the_temporary_folder(small_disk: Path, temporary: Path) -> None:
    posterior = from_prior(0, policy=table_lm())
    with pytest.raises(OSError, match="svi could not be written: No space left") as caught:
        resume.Results(small_disk).save("svi", posterior)
    (folder,) = temporary.glob("*/svi")
    assert caught.value.__notes__ == [f"the results of svi are in {folder} instead"]
    assert (Posterior.load(folder).rewards["reward"] == posterior.rewards["reward"]).all()
    assert not list(small_disk.iterdir())


def test_nothing_can_be_saved(tmp_path: Path, temporary: Path) -> None:
    with full_disk(10), pytest.raises(OSError, match="svi could not be written") as caught:
        resume.Results(tmp_path / "out").save("svi", from_prior(0, policy=table_lm()))
    assert caught.value.__notes__[0].startswith(f"nothing of svi could be saved in {temporary} either")


def test_plots_that_cannot_be_written_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: None
) -> None:
    (tmp_path / "rewards.png").write_text("before")
    with full_disk(100):
        assert comparison._save_plots({"importance": from_prior(0)}, tmp_path) == ["no plots"]
    assert "rewards.pngcouldnotbewritten" in "".join(capsys.readouterr().err.split())  # lines break anywhere
    assert [(path.name, path.read_text()) for path in tmp_path.glob("*.png")] == [("rewards.png", "before")]


def test_comparisons_replace_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    few, path = Comparisons(["p"], ["a"], ["b"]), tmp_path / "data.jsonl"
    few.to_jsonl(path)
    many = Comparisons([*few.prompts, *["q"] * 999], [*few.chosen, *["c"] * 999], [*few.rejected, *["d"] * 999])
    with full_disk(1000), pytest.raises(OSError, match=f"{path} could not be written: File too large"):
        many.to_jsonl(path)
    assert Comparisons.from_jsonl(path) == few
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["data.jsonl"]
    many.to_jsonl(path)
    assert Comparisons.from_jsonl(path) == many
