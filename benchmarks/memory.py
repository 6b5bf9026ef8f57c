"""Peak memory of scoring SmolLM2-135M's completions, with and without gradient (LoRA), as particles grow.

    python benchmarks/memory.py

Each case runs in a process of its own; the figure is its peak resident memory above that before scoring. Beside it,
what the logits of all tokens would take in float32 (particles x tokens x vocabulary), which is never held.
"""

from __future__ import annotations

import subprocess
import sys

from _memory import peak

TOKENS = 24


def measure(particles: int, kind: str) -> None:
    import torch

    from bayeslm.models import LanguageModel

    lm = LanguageModel.from_pretrained("smollm2")
    if kind != "no":
        lm.gradient_checkpointing = kind == "checkpointed"
        lm = lm.policy(lora_rank=16)
    distribution = lm(["My dinner at the restaurant was"], max_new_tokens=TOKENS).expand((particles, 1))
    value = torch.randint(3, lm.vocab_size, (particles, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    distribution.log_prob(value[:1])
    before = peak()
    score = distribution.log_prob(value)
    if kind != "no":
        score.sum().backward()
    print(peak() - before, lm.vocab_size)


def main() -> None:
    print("| particles | gradient | peak above start, MB | all logits in float32, MB |")
    print("|---|---|---|---|")
    for kind in ("no", "yes", "checkpointed"):
        for particles in (16, 64, 256):
            arguments = [sys.executable, __file__, str(particles), kind]
            out = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
            logits = particles * TOKENS * int(out[-1]) * 4 / 2**20
            print(f"| {particles} | {kind} | {float(out[-2]):.0f} | {logits:.0f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
    else:
        main()
