r"""Which layers' adapters lead towards the posterior: how well a gradient from few texts agrees with the reward.

    OMP_NUM_THREADS=1 python benchmarks/adapter_layers.py [--texts 288]         # ten minutes of one core

A small step d moves log q(x) by d . s(x), s(x) = \nabla log q(x), and what it gains is limited by the correlation of
d . s(x) with the reward: of a step whose KL is \delta at most

    corr(d . s, l) sd(l) \sqrt(2 \delta),      l = r / beta.

So texts of the prior are drawn, with their score vectors in the adapters' matrices B (those in A are 0 at first).
From n of the texts Adam's first direction is made, mean over root mean square of the gradients of lots of 16, of a
subset of the layers and columns of B (the rank); and the correlation is computed over 88 other texts: the mean over
random divisions, ± the standard error that these differ by, which overlap. The prompt is not one on which trainings are
judged (`svi_smollm2.CHOSEN_ON`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
from svi_smollm2 import BETA, CHOSEN_ON, TOKENS
from torch import Tensor

from bayeslm.models import LanguageModel, rewards

RANK, LOT, HELD_OUT, DIVISIONS = 4, 16, 88, 8
SUBSETS: dict[str, Callable[[int, str], bool]] = {
    "all": lambda layer, name: True,
    "last 2/3": lambda layer, name: layer >= 10,
    "last half": lambda layer, name: layer >= 15,
    "last third": lambda layer, name: layer >= 20,
    "last sixth": lambda layer, name: layer >= 25,
    "third quarter": lambda layer, name: 15 <= layer < 23,
    "last half, attention": lambda layer, name: layer >= 15 and "self_attn" in name,
    "last half, MLP": lambda layer, name: layer >= 15 and "mlp" in name,
}


def scores(prior: LanguageModel, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return score vectors (text, output, rank) in each module's B, and l (text,)."""
    torch.manual_seed(123)
    prompt = CHOSEN_ON[0]
    with torch.no_grad():
        x = prior.packed()([prompt], TOKENS).expand((number, 1)).sample()
    reward = rewards.Sentiment()([prompt], prior.decode(x))[:, 0].float()
    distribution = prior([prompt], TOKENS)
    ids, lengths = distribution.prompt_ids[0], distribution.lengths(x)[:, 0].tolist()
    network: Any = prior.policy(RANK).network
    weights = {name: p for name, p in network.named_parameters() if "lora_B" in name}
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for text, length in zip(x[:, 0], lengths, strict=True):
        row = torch.cat([ids, text[:length]])
        logits = network(input_ids=row[None, :-1]).logits[0, len(ids) - 1 :]
        log_q = logits.log_softmax(-1).gather(-1, row[len(ids) :, None]).sum()
        for name, g in zip(weights, torch.autograd.grad(log_q, list(weights.values())), strict=True):
            found[name].append(g)
    return {name: torch.stack(parts) for name, parts in found.items()}, reward / BETA


def correlation(f: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([f, y]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=288)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vectors, likelihood = scores(LanguageModel.from_pretrained("smollm2", dtype=torch.float32), options.texts)
    numbers = [n for n in (16, 64, options.texts - HELD_OUT) if 0 < n <= options.texts - HELD_OUT]
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(options.texts, generator=generator) for _ in range(DIVISIONS)]
    print(f"| layers | rank | {' | '.join(f'{n} texts' for n in numbers)} |\n|---|---|" + "---|" * len(numbers))
    for rank in (1, RANK):
        moved = torch.zeros(len(SUBSETS), len(numbers), DIVISIONS, options.texts)  # d . s of all texts
        for name, s in vectors.items():
            s = s[:, :, :rank].flatten(1)
            s = s - s.mean(0)
            layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
            inside = [i for i, subset in enumerate(SUBSETS.values()) if subset(layer, name)]
            for j, n in enumerate(numbers):
                for k, order in enumerate(orders):
                    chosen = order[:n]
                    weight = likelihood[chosen] - likelihood[chosen].mean()
                    lots = zip(weight.split(LOT), s[chosen].split(LOT), strict=True)
                    each = torch.stack([w @ v / len(w) for w, v in lots])
                    moved[inside, j, k] += s @ (each.mean(0) / (each.square().mean(0).sqrt() + 1e-8))
        for i, subset in enumerate(SUBSETS):
            cells = []
            for j in range(len(numbers)):
                rest = [order[-HELD_OUT:] for order in orders]
                found = torch.tensor([correlation(moved[i, j, k, x], likelihood[x]) for k, x in enumerate(rest)])
                cells.append(f"{found.mean():.3f} ± {found.std() / DIVISIONS**0.5:.3f}")
            print(f"| {subset} | {rank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
