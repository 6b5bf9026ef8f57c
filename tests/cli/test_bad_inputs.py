"""Damaged, incomplete and hostile files, and impossible options: one line with the file's or the option's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.folders import MODEL, USES, write_folders
from typer.testing import CliRunner

from bayeslm.checksums import NAME, write_checksums
from bayeslm.cli import app

JSON = {"deep": b"[" * 100_000, "no keys": b"{}", "no object": b"null", "cut": b'{"a', "bytes": b"\xff\xfe\0"}
OTHERS = ("no object", "cut", "bytes")
EMPTY_IS_RIGHT = ("generation_config.json", "tokenizer_config.json", "bayeslm.json")  # all their keys are optional


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all folders."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments: list[str], code: int = 1) -> str:
    """Run a command that must end with a code and one line; return the line."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.output.strip().splitlines()
    assert (result.exit_code, len(lines)) == (code, 1), result.output
    assert lines[0].startswith("bayeslm: ")
    assert "unexpected" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("how", ["deep", "no keys", *(pytest.param(how, marks=pytest.mark.long) for how in OTHERS)])
@pytest.mark.parametrize("name", USES)
def test_each_json_file(place: Path, name: str, how: str) -> None:
    files = sorted(path for path in Path(name).rglob("*.json"))
    assert files
    for path in files:
        if how == "no keys" and path.name in EMPTY_IS_RIGHT:
            continue
        content = path.read_bytes()
        path.write_bytes(JSON[how])
        write_checksums(Path(name))  # whoever wrote the file wrote them too
        assert path.name in refused(USES[name])
        path.write_bytes(content)


@pytest.mark.parametrize("ids", ["NaN", '"x"', "[null]", "[[1]]", "1.5"])
def test_token_ids_that_are_none(place: Path, ids: str) -> None:
    path = Path("model/generation_config.json")
    settings = json.loads(path.read_text()) | {"eos_token_id": None}
    path.write_text(json.dumps(settings).replace('"eos_token_id": null', f'"eos_token_id": {ids}'))
    write_checksums(Path("model"))
    assert "of model has the eos_token_id" in refused(USES["model"])


@pytest.mark.parametrize("keep", [0.0, pytest.param(0.01, marks=pytest.mark.long), 0.999])
@pytest.mark.parametrize("name", USES)
def test_each_file_of_arrays_cut(place: Path, name: str, keep: float) -> None:
    (path,) = (path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".nc"))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    write_checksums(Path(name))
    assert path.name in refused(USES[name])


@pytest.mark.parametrize("name", ["posterior", "twist"])  # a model's folder may come from elsewhere, without
def test_without_its_checksums(place: Path, name: str) -> None:
    (place / name / NAME).unlink()
    assert NAME in refused(USES[name])


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"PK\5\6" + bytes(18)])
def test_a_posterior_of_an_earlier_version(place: Path, content: bytes) -> None:
    """Its arrays were in an npz, here damaged or empty: that is not read, whatever it holds."""
    Path("old").mkdir()
    Path("old/posterior.json").write_text('{"format": "bayeslm.posterior/1"}')
    Path("old/arrays.npz").write_bytes(content)
    assert "old/posterior.json has format 'bayeslm.posterior/1'" in refused(["show", "old"])


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no"),
    "cut": lambda path: (torch.save({"a": torch.ones(9)}, path), path.write_bytes(path.read_bytes()[:-200])),
    "a function": lambda path: torch.save(print, path),
    "a number": lambda path: torch.save(3, path),
    "no keys": lambda path: torch.save({}, path),
    "a key less": lambda path: None,
}


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize(("name", "file"), [("policy", "adapter_model.bin"), ("model", "pytorch_model.bin")])
def test_weights_of_torch_save(place: Path, name: str, file: str, how: str) -> None:
    from safetensors.torch import load_file

    (old,) = Path(name).glob("*.safetensors")
    tensors = load_file(old)
    tensors.popitem()
    old.unlink()
    torch.save(tensors, Path(name) / file)
    WEIGHTS[how](Path(name) / file)
    write_checksums(Path(name))
    line = refused(USES[name])
    assert (file if how in ("empty", "text", "cut") else name) in line
    if "key" in how:
        assert "lacks the weights" in line


FILES: dict[str, bytes] = {
    "deep.jsonl": b"[" * 100_000,
    "deep.json": b"[" * 100_000,
    "deeper.jsonl": b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no-keys.jsonl": b"{}",
    "no-keys.csv": b"text\na\n",
    "null.json": b"null",
    "empty.jsonl": b"",
    "bytes.txt": bytes(range(256)),
    "cut.jsonl": b'{"prompt": "a',
    "cut.parquet": b"PAR1xxxxPAR1",
}


@pytest.mark.parametrize("name", [*FILES, "held out"])
def test_files_of_prompts(place: Path, name: str) -> None:
    if name == "held out":
        Path("deep.json").write_bytes(FILES["deep.json"])
        assert "deep.json" in refused([*MODEL, "--engine", "svi(callbacks=[HeldOut('deep.json')])"])
    else:
        Path(name).write_bytes(FILES[name])
        assert name in refused([*(x for x in MODEL if x != "a"), "--prompts", name])


@pytest.mark.parametrize("how", JSON)
def test_the_call_of_an_output_folder(place: Path, how: str) -> None:
    Path("run").mkdir()
    Path("run/call.json").write_bytes(JSON[how])
    shutil.copytree("posterior", "run/importance")
    for command in ([*MODEL, "--out", "run"], ["show", "run"]):
        assert "run/call.json" in refused(command)


NO_NUMBERS = ["1e20", ""]
COUNTS = ["batch-size", "subsample-size", "max-new-tokens", "seed"]
OWN = ["importance(num_particles={})", "mcmc(warmup={})", "mcmc(num_samples={})", "smc(num_chains={})", "smc(top_k={})"]
HUGE = str(10**20)


@pytest.mark.parametrize("option", COUNTS)
def test_numbers_that_are_no_counts(place: Path, option: str) -> None:
    for value in NO_NUMBERS:
        result = CliRunner().invoke(app, [*MODEL, f"--{option}", value])
        assert result.exit_code == 2, result.output
        lines = [line for line in result.output.splitlines() if "Invalid value" in line]
        assert len(lines) == 1
        assert f"--{option}" in lines[0]
        assert "Traceback" not in result.output
    line = refused([*MODEL, f"--{option}", HUGE], 2)
    assert HUGE in line
    assert f"--{option} must be" in line


@pytest.mark.parametrize("own", OWN)
def test_settings_that_are_no_counts(place: Path, own: str) -> None:
    setting = own.partition("(")[2].partition("=")[0]
    for value in ["1e20", "0", "''", "None", "True", HUGE]:
        assert f"{setting} must be" in refused([*MODEL, "--engine", own.format(value)], 2)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "tpu"])
def test_devices(place: Path, device: str) -> None:
    assert f"--device {device}" in refused([*MODEL, "--device", device], 2)


@pytest.mark.parametrize("reward", ["1e308 * length", "os:system", "fails:f"])
def test_a_failing_reward_is_shown_without_pyros_table(place: Path, reward: str) -> None:
    Path("fails.py").write_text("def f(completions, **_):\n    return [10**400] * len(completions)\n")
    result = CliRunner().invoke(app, [*MODEL, "--reward", reward])
    assert result.exit_code == 1
    first, prompt, completion = result.output.strip().splitlines()
    assert first.startswith("bayeslm: reward ")
    assert prompt.startswith("  prompt: ")
    assert completion.startswith("  completion: ")
