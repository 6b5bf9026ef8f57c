"""The tables of scale.md, from formulas: `python docs/scale_tables.py` writes them; a test checks that it has.

What a pass holds is `bayeslm.models.lm.memory`'s, whose formulas are checked against measured memory. Here is what
else there is: weights, adapters and Adam; seconds, by multiplications and by bytes read; bytes between GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bayeslm.models.lm.memory import Batches, Footprint, rounded

PARTICLES, PROMPTS, PROMPT, NEW, RANK = 64, 16, 512, 512, 16
GPUS = (1, 8, 64)
MEMORY, RESERVED = 80e9, 2e9  # bytes of a GPU, and of them what CUDA and its libraries take
MULTIPLY, USED = 989e12, 0.4  # operations a second of bfloat16, and the share that is reached
READ = 3.35e12 * 0.7  # bytes a second from the GPU's memory
LINK = {1: float("inf"), 8: 450e9, 64: 50e9}  # bytes a second from one GPU to the others
PAGE = Path(__file__).with_name("scale.md")


@dataclass(frozen=True)
class Network:
    """A Llama: its name and sizes."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv: int
    head_width: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps."""
        d, h = self.width, self.head_width
        attention = [(d, self.heads * h), (d, self.kv * h), (d, self.kv * h), (self.heads * h, d)]
        return [*attention, (d, self.inner), (d, self.inner), (self.inner, d)]

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return sum(a * b for a, b in self.linear) + 2 * self.width

    @property
    def around(self) -> int:
        """Weights outside the layers."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def weights(self) -> int:
        return self.layers * self.layer + self.around

    def adapters(self, rank: int) -> int:
        """Weights of LoRA of this rank."""
        return self.layers * rank * sum(a + b for a, b in self.linear)

    @property
    def footprint(self) -> Footprint:
        """As `CausalNetwork` counts it, in bfloat16."""
        return Footprint(
            layers=self.layers,
            width=self.width,
            cached=2 * self.layers * self.kv * self.head_width,
            inside=4 * self.width + 3 * self.inner + 2 * self.head_width,
            kept=12 * self.width + 4 * self.inner,
            vocabulary=self.vocabulary,
            bytes_each=2,
        )


NETWORKS = [
    Network("1B", 16, 2048, 8192, 32, 8, 64, 128_256, True),
    Network("8B", 32, 4096, 14336, 32, 8, 128, 128_256, False),
    Network("70B", 80, 8192, 28672, 64, 8, 128, 128_256, False),
]


@dataclass(frozen=True)
class Setting:
    """A network on GPUs, whole on each or sharded over all."""

    network: Network
    gpus: int
    sharded: bool

    @property
    def held(self) -> float:
        """Bytes of weights on a GPU: sharded, its part, two layers that are gathered, and what is outside them."""
        own = 2.0 * self.network.weights
        return own / self.gpus + 2 * (2 * self.network.layer + self.network.around) if self.sharded else own

    @property
    def trained(self) -> float:
        """Bytes of adapters in training: themselves, the gradient, Adam's two moments, the first and the best."""
        return 6 * 4.0 * self.network.adapters(RANK)

    @property
    def batches(self) -> Batches | None:
        """The rows of a pass in what is left; None if nothing is."""
        left = int(MEMORY - RESERVED - self.held - self.trained)
        return Batches(self.network.footprint, rounded(left), PROMPT, NEW) if left > 2e9 else None

    @property
    def rows(self) -> int:
        """Completions of a GPU in a step."""
        return PARTICLES * PROMPTS // self.gpus

    @property
    def gathered(self) -> float:
        """Bytes that a GPU receives in a pass: all weights that others hold."""
        return 2.0 * self.network.weights * (1 - 1 / self.gpus) if self.sharded else 0.0

    def seconds(self) -> tuple[float, float, float]:
        """Of drawing, of scoring by the prior, and of the gradient of the completions of a step."""
        assert self.batches is not None
        n, each, cached = self.network.weights, 2.0 / (MULTIPLY * USED), 2.0 * self.network.footprint.cached
        wait = self.gathered / LINK[self.gpus]
        passes = -(-self.rows // self.batches.decoding)
        reading = (2.0 * n * passes + self.rows * cached * (PROMPT + NEW / 2)) / READ
        token = max(reading, n * self.rows * each) + passes * wait
        prefill = PROMPTS * PROMPT * n * each + wait
        score = max(self.rows * NEW * n * each, 2.0 * n / READ)
        score += -(-self.rows // self.batches.scoring()) * wait
        checkpointed = -(-self.rows // self.batches.gradient(True))
        gradient = 3 * self.rows * (PROMPT + NEW) * n * each + 2 * checkpointed * wait  # forward twice, backward
        return prefill + NEW * token, score, gradient

    def bytes_a_step(self) -> tuple[float, float]:
        """Sent by a GPU: sums of adapters' gradients, and gathered weights."""
        assert self.batches is not None
        share = 1 - 1 / self.gpus
        passes = NEW * -(-self.rows // self.batches.decoding) + -(-self.rows // self.batches.scoring())
        passes += 2 * -(-self.rows // self.batches.gradient(True))
        return 2 * share * 4.0 * self.network.adapters(RANK), passes * self.gathered


def settings() -> Iterator[Setting]:
    """Give the rows of the tables."""
    for network in NETWORKS:
        for gpus in GPUS:
            yield Setting(network, gpus, sharded=False)
            if gpus > 1:
                yield Setting(network, gpus, sharded=True)


MEMORY_COLUMNS = "weights, GB | adapters in training, GB | rows drawn | rows scored | rows of a gradient"
TIME_COLUMNS = "drawing, s | scoring, s | gradient, s | gradients, MB | weights, GB"


def tables() -> dict[str, str]:
    """Return the tables of the page by name."""
    first = "| network | GPUs | weights are |"
    memory = [f"{first} {MEMORY_COLUMNS} |", "|---" * 8 + "|"]
    time = [f"{first} {TIME_COLUMNS} |", "|---" * 8 + "|"]
    for x in settings():
        name = f"| {x.network.name} | {x.gpus} | {'sharded' if x.sharded else 'whole'} |"
        held = f" {x.held / 1e9:.1f} | {x.trained / 1e9:.1f} |"
        if (sizes := x.batches) is None:
            memory.append(f"{name}{held} do not fit | | |")
            continue
        memory.append(f"{name}{held} {sizes.decoding} | {sizes.scoring()} | {sizes.gradient(True)} |")
        seconds = " ".join(f"{each:.0f} |" if each >= 10 else f"{each:.2g} |" for each in x.seconds())
        gradients, weights = x.bytes_a_step()
        time.append(f"{name} {seconds} {gradients / 1e6:.0f} | {weights / 1e9:,.0f} |")
    return {"memory": "\n".join(memory), "time": "\n".join(time)}


def written(page: str) -> str:
    """Return a page with the tables between its marks."""
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
