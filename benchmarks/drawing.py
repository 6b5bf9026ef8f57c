"""Tokens a second of drawing SmolLM2-135M: its own decoding, transformers' generate_batch, and vLLM's server.

    OMP_WAIT_POLICY=passive python benchmarks/drawing.py [--rows 8 32] [--tokens 32] [--repeats 3]
        [--vllm http://localhost:8000/v1]

(Beside other work threads that wait actively for one another can keep it from its first row for minutes.)

The server is started beside it, in vLLM's environment (build/vllm/bin is `make test-vllm`'s), on a CPU with
VLLM_CPU_KVCACHE_SPACE=1 (GiB), for it wants nearly all memory otherwise, and with the folder that
`python -c "from bayeslm.models.lm import loading; print(loading.location('smollm2'))"` prints:

    python -m vllm.entrypoints.openai.api_server --model FOLDER --dtype float32 --enforce-eager --max-model-len 512

Without --vllm it is left out. Every sampler draws the same number of completions of one prompt, none of which ends
before the limit; the time has the scoring of the draws by the network, which the samplers need and own decoding does
not. The median of alternating runs, and how far the densities differ. At most 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from bayeslm.models import LanguageModel
from bayeslm.models.lm import count_usage
from bayeslm.models.samplers import ContinuousBatching, VLLMServer

PROMPT = "My dinner at the restaurant was"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm", help="the server's address")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    loaded = LanguageModel.from_pretrained("smollm2", device=options.device)
    lm = LanguageModel(loaded.network, loaded.tokenizer, eos_token_ids=(), pad_token_id=loaded.pad_token_id)
    samplers = {"own": None, "generate_batch": ContinuousBatching()}
    if options.vllm:
        samplers["vLLM"] = VLLMServer(options.vllm)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.tokens} tokens\n")
    print("| rows | who draws | tokens/s | against own | largest and mean difference, nats a token |")
    print("|---|---|---|---|---|")
    for rows in options.rows:
        dist, seconds, differences = lm([PROMPT], max_new_tokens=options.tokens), {}, {}
        for repeat in range(options.repeats + 1):
            for name, sampler in samplers.items():
                lm.sampler = sampler
                with count_usage() as usage:
                    start = time.perf_counter()
                    dist.sample((rows,))
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                differences[name] = usage.drawn.stats().get("sampler_difference")
            if repeat == 0:  # to warm up
                seconds.clear()
        own = statistics.median(seconds["own"])
        for name, each in seconds.items():
            median = statistics.median(each)
            shown = "" if differences[name] is None else "{:.1e}, {:.1e}".format(*differences[name])
            print(
                f"| {rows} | {name} | {rows * options.tokens / median:.0f} | {own / median:.2f} | {shown} |", flush=True
            )


if __name__ == "__main__":
    main()
