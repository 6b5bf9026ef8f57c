"""Drawing texts by a compiled decode step (`LanguageModel(compile=True)`) beside drawing without one.

    python benchmarks/compiled.py [--device cpu] [--networks small deep smollm2] [--rows 8 32 128] [--repeats 5]

All ways draw the same texts from the same seeds, in turn in one process, so that other work on the machine slows all of
them. A ratio is that of two neighbours in time: its median over the repeats, and its range. Texts do not end before the
last token. `packed` is `LanguageModel.packed()`, which is for the CPU. The first draw, which compiles, is timed alone.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bayeslm.models import LanguageModel
from bayeslm.models.lm import remembering

TOKENS = 32
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
SIZES = {"small": (2, 64), "deep": (30, 32)}  # layers and width


def network_of(name: str) -> torch.nn.Module:
    if name == "smollm2":
        return LanguageModel.from_pretrained("smollm2").network
    layers, width = SIZES[name]
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, num_key_value_heads=2, **shape))


def seconds(lm: LanguageModel, rows: int, seed: int) -> tuple[float, torch.Tensor]:
    """Return the seconds of a draw, and its texts."""
    torch.manual_seed(seed)
    distribution = lm(PROMPTS, TOKENS).expand((rows // len(PROMPTS), len(PROMPTS)))
    start = time.perf_counter()
    drawn = distribution.sample()
    host = drawn.cpu()  # waits for the device
    return time.perf_counter() - start, host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["small", "deep", "smollm2"], choices=[*SIZES, "smollm2"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {TOKENS} tokens a text\n")
    print("| network | rows | plain, ms a token | packed | compiled | plain / compiled (range) | packed / compiled |")
    print("|---|---|---|---|---|---|---|")
    for name in options.networks:
        plain, compiled = (
            LanguageModel(network_of(name), eos_token_ids=(), pad_token_id=0, compile=compile).to(options.device)
            for compile in (False, True)
        )
        ways = [plain, plain.packed(), compiled]
        first, _ = seconds(compiled, options.rows[0], 0)
        for rows in options.rows:
            with remembering():
                for lm in ways:
                    seconds(lm, rows, 0)
                times, same = [], []
                for seed in range(options.repeats):
                    each = [seconds(lm, rows, seed) for lm in ways]
                    times.append([t for t, _ in each])
                    same.append(float((each[0][1] == each[2][1]).all(-1).float().mean()))
            table = np.array(times)
            ms = 1e3 * np.median(table, 0) / TOKENS
            ratio, packed = table[:, 0] / table[:, 2], table[:, 1] / table[:, 2]
            print(
                f"| {name} | {rows} | {ms[0]:.2f} | {ms[1]:.2f} | {ms[2]:.2f} "
                f"| {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) | {np.median(packed):.2f} |",
                flush=True,
            )
            if min(same) < 0.95:
                raise SystemExit(f"{name}: of texts of one seed only {min(same):.0%} are the same")
        print(f"<!-- {name}: the first draw took {first:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
