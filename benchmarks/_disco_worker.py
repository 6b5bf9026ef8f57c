"""disco's side of `moments.py`: its `constrain`, as in its README, on a model in a folder."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from _peer import serve


def answer(
    folder: str, context: str, words: list[str], targets: list[float], samples: int, length: int, seed: int
) -> dict[str, Any]:
    from disco.distributions import LMDistribution
    from disco.distributions.single_context_distribution import SingleContextDistribution
    from disco.scorers import BooleanScorer

    torch.manual_seed(seed)
    base = LMDistribution(folder, length=length, device="cpu")
    features = [BooleanScorer(lambda s, c, word=word: word in s.text) for word in words]
    start = time.perf_counter()
    contexts = SingleContextDistribution(context)
    target = base.constrain(features, targets, n_samples=samples, context_distribution=contexts, sampling_size=samples)
    seconds = time.perf_counter() - start
    return {"coefficients": target.scorers[1].coefficients.tolist(), "seconds": seconds}


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])
    serve(answer)
