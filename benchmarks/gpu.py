"""SVI on an accelerator: a result that can be checked, then tokens a second and memory on SmolLM2-135M-Instruct.

    python benchmarks/gpu.py [--device cuda] [--particles 16 64 256] [--steps 20]

1. The third problem of `svi_trl.py`, all of it on the device: `Exact` enumerates the posterior, the log-variance
   divergence with replay trains on 24,576 samples, and KL(q || posterior) over all completions must be at most 0.03.
2. SmolLM2 with LoRA, in float32 and in bfloat16, as in `svi_smollm2.py` but with more completions a step. Tokens a
   second are those of the completions that steps draw and learn from. The log-probability of a token as it was drawn,
   one at a time with a cache, must be that of scoring, all at once, up to the rounding of the weights' type.

Without an accelerator it says so and runs on the CPU, with fewer completions and steps.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from importlib.metadata import version

import pyro
import torch
from _memory import peak, reset_peak
from svi_smollm2 import BETA, PROMPT, RANK, TOKENS
from svi_trl import PROMPT as IDS
from svi_trl import Problem, count
from torch import Tensor

from bayeslm.inference import SVI, Exact
from bayeslm.inference.training import Adam, AutoPolicy, LogVariance, Replay, StepRecord
from bayeslm.models import LanguageModel, rewards

SAMPLES, GROUP, EVERY, RATE, LIMIT = 24576, 512, 8, 1e-2, 0.03
WARM_UP = 2  # steps that are not counted
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # nats a token, root mean square, at the most


class Meter:
    """Seconds on the device, and the most of its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_peak()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def memory(self) -> float:
        """MB: what tensors took on the device, or the complete process on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else peak()


def known(device: torch.device) -> tuple[float, float]:
    """KL(q || posterior) where `Exact` knows the posterior, and the seconds of the run."""
    problem = Problem(count, 2, 0.3)
    problem.lm.to(device)
    log_z = float(Exact().run(problem.model, [IDS]).log_evidence[0])
    start = time.perf_counter()
    objective = LogVariance(GROUP, Replay(SAMPLES, EVERY))
    steps = EVERY * SAMPLES // GROUP
    engine = SVI(num_steps=steps, optimizer=Adam(RATE), objective=objective, num_samples=1, seed=0, progress=False)
    policy = engine.run(problem.model, [IDS]).policy
    seconds = time.perf_counter() - start
    distribution, prior = (lm([IDS], problem.values.shape[-1]) for lm in (policy, problem.lm))
    x = distribution.enumerate_support()
    with torch.no_grad():
        log_q, log_p = distribution.log_prob(x)[:, 0].double(), prior.log_prob(x)[:, 0].double()
        log_target = log_p + count(x)[:, 0].double() / problem.beta
        return float((log_q.exp() * (log_q - log_target)).sum()) + log_z, seconds


def rounding(lm: LanguageModel, number: int) -> float:
    """The root mean square, in nats, of what drawing and scoring say of the same tokens' log-probability."""
    with torch.no_grad():
        distribution = lm([PROMPT], TOKENS).expand((number, 1))
        x = distribution.sample()
        drawn = distribution.token_log_prob(x)
        scored = distribution.token_log_prob(x.clone())  # a copy: the scores of the sample itself are kept
    return float((drawn - scored).square().sum().div(distribution.lengths(x).sum()).sqrt())


def train(lm: LanguageModel, particles: int, steps: int) -> tuple[float, float, float]:
    """Milliseconds a step, tokens a second, MB."""
    sentiment = rewards.Sentiment()
    lengths: list[Tensor] = []
    marks: list[tuple[float, int]] = []  # when a step ended, and how many runs of the program there had been

    def model(prompts: list[str]) -> None:
        distribution = lm(prompts, TOKENS)
        with pyro.plate("prompts", len(prompts)):
            x = pyro.sample("completion", distribution)
            lengths.append(distribution.lengths(x).sum())
            rewards.factor("reward", sentiment(prompts, lm.decode(x)).to(x.device), BETA)

    meter = Meter(lm.device)

    def watch(record: StepRecord) -> None:
        marks.append((meter.now(), len(lengths)))

    engine = SVI(
        num_steps=steps,
        num_particles=particles,
        guide=functools.partial(AutoPolicy, lora_rank=RANK),
        callbacks=[watch],
        num_samples=1,
        seed=0,
        progress=False,
    )
    engine.run(model, [PROMPT])
    (start, first), (end, last) = marks[WARM_UP], marks[-1]
    tokens = int(torch.stack(lengths[first:last]).sum())
    return 1e3 * (end - start) / (steps - WARM_UP), tokens / (end - start), meter.memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: cuda, where there is one")
    parser.add_argument("--particles", type=int, nargs="+", help="completions a step; default 16 64 256, on a CPU 8")
    parser.add_argument("--steps", type=int, help="default 20, on a CPU 4")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    small = device.type == "cpu"
    if small and options.device is None:
        print("no CUDA device here: the CPU, with smaller sizes\n", flush=True)
    particles = options.particles or ([8] if small else [16, 64, 256])
    steps = options.steps or (4 if small else 20)
    if steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, since the first {WARM_UP} are not counted")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{names}; {card}\n")

    kl, seconds = known(device)
    print(f"KL(q ‖ posterior) {kl:.4f} after {SAMPLES} samples, {seconds:.0f} s; at most {LIMIT}\n", flush=True)
    if not kl <= LIMIT:
        sys.exit("the policy is not the posterior")

    print("| weights | completions a step | ms a step | tokens a second | peak memory, MB | drawn less scored |")
    print("|---|---|---|---|---|---|")
    for dtype, limit in ROUNDING.items():
        lm = LanguageModel.from_pretrained("smollm2", device=device, dtype=dtype)
        difference = rounding(lm, 64)
        if not difference <= limit:
            sys.exit(f"{dtype}: drawn and scored log-probabilities differ by {difference:.2g} nats a token")
        for number in particles:
            step, speed, memory = train(lm, number, steps)
            columns = f"{number} | {step:.0f} | {speed:.0f} | {memory:.0f} | {difference:.1e}"
            print(f"| {str(dtype).removeprefix('torch.')} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
