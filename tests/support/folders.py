"""Folders that the command line reads, each whole, and the command that uses it."""

from __future__ import annotations

from pathlib import Path

from bayeslm.inference import Exact
from bayeslm.models import TiltedLM, Twist, rewards

from .models import table_lm, tiny_llama

MODEL = ["infer", "a", "--prior", "model", "--reward", "length", "--max-new-tokens", "2"]
USES = {
    "posterior": ["show", "posterior"],
    "model": MODEL,
    "policy": [*MODEL, "--engine", "importance(num_particles=4, guide=LanguageModel('policy'))"],
    "twist": [*MODEL, "--engine", "smc(num_particles=4, twist=Twist('twist'))"],
}


def write_folders(folder: Path) -> Path:
    """Write the folders of `USES` into a folder."""
    model = tiny_llama(scale=1.0)
    model.save_pretrained(folder / "model")
    model.policy(lora_rank=2).save_pretrained(folder / "policy")
    Twist(model, 2).save_pretrained(folder / "twist")
    tilted = TiltedLM(table_lm(2, vocab=3), rewards.Length(), max_new_tokens=2)
    Exact(seed=0).run(tilted, ["a"]).save(folder / "posterior")
    return folder
