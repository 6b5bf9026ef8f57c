"""How near `SVI()` comes to the best policy of its class, for classes that do not hold the posterior.

    OMP_NUM_THREADS=1 python benchmarks/tables.py [--samples 6400] [--seeds 3] [--chosen] [--only "order 2"]

Priors are tables of 6 words that see none, one or two tokens back (orders 1 to 3), with logits of spread 1 and 3; texts
have 5 tokens. Rewards are a random score of each token at each place, which no such table can follow, beta 0.5 and
0.15. The best policy of the class minimises KL(q || posterior) over the table's logits. It is found from the exact
gradient over all texts, in float64, by L-BFGS until that is 0, from the prior, a uniform table, random ones, and from
each policy that SVI has trained; the lowest counts. Of `SVI(Budget(samples=...))`, without a setting, the table has
KL(q || posterior) of its policy minus that, each seed's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from trust_region import PROMPT, Problem, table

from bayeslm.inference import SVI
from bayeslm.inference.training import Budget
from bayeslm.models import LanguageModel

STARTS = 12  # random tables


class Class:
    """KL(q || posterior) of all tables of one order, by enumeration in float64."""

    def __init__(self, problem: Problem) -> None:
        self._log_posterior = problem.log_posterior
        self._network = copy.deepcopy(problem.lm.network).double()
        values = problem.values[:, 0]  # (text, token)
        prompt = torch.tensor(PROMPT).expand(len(values), -1)
        self._tokens = torch.cat([prompt, values], 1)
        self._values = values
        # a text ends with its first end token, which counts; what is behind it is padding
        end = problem.lm([PROMPT], values.shape[1]).vocabulary.is_end(values)
        self._written = end.cumsum(1) - end.long() == 0

    def kl(self, weights: Tensor) -> Tensor:
        """Return the KL of the table with these logits (context, vocabulary)."""
        call = torch.func.functional_call(
            self._network, {"table": weights}, (self._tokens[:, :-1],), {"use_cache": False}
        )
        log_p = call.logits[:, len(PROMPT) - 1 :].log_softmax(-1).gather(-1, self._values[..., None])[..., 0]
        log_q = torch.where(self._written, log_p, 0.0).sum(1)
        return (log_q.exp() * (log_q - self._log_posterior)).sum()

    def lowest(self, start: Tensor) -> float:
        """Return the KL of the local minimum to which L-BFGS comes from a table."""

        def value(x: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(x).reshape(start.shape).requires_grad_()
            kl = self.kl(weights)
            return float(kl.detach()), torch.autograd.grad(kl, weights)[0].reshape(-1).numpy()

        x = start.detach().double().reshape(-1).numpy()
        limits = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 30}
        found = minimize(value, x, jac=True, method="L-BFGS-B", options=limits)
        return float(found.fun)


def weights_of(lm: LanguageModel) -> Tensor:
    (weights,) = lm.network.parameters()
    return weights.detach()


def problems(chosen: bool) -> Iterator[tuple[str, Problem]]:
    prior, reward = (0, 100) if chosen else (5, 105)
    for order in (1, 2, 3):
        for spread in (1.0, 3.0):
            for beta in (0.5, 0.15):
                name = f"order {order}, spread {spread:g}, beta {beta}"
                yield name, Problem(table(prior, spread, order), reward, beta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chosen", action="store_true", help="the problems on which settings are chosen")
    parser.add_argument("--only", default="", help="problems with this in their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the one draw that each training ends with
    print(f"| problem | prior's KL | the best policy's | SVI's minus that, {options.seeds} seeds | seconds |")
    print("|---|---|---|---|---|")
    for name, problem in problems(options.chosen):
        if options.only not in name:
            continue
        policies, seconds = [], []
        for seed in range(options.seeds):
            engine = SVI(Budget(samples=options.samples), num_samples=1, num_prior_samples=0, seed=seed, progress=False)
            begun = time.perf_counter()
            policies.append(engine.run(problem.model, [PROMPT]).policy)
            seconds.append(time.perf_counter() - begun)
        family, prior = Class(problem), weights_of(problem.lm)
        assert abs(float(family.kl(prior.double())) - problem.kl(problem.lm)) < 1e-4  # two ways to the same figure
        generator = torch.Generator().manual_seed(0)
        noise = [2.0 * torch.randn(prior.shape, generator=generator) for _ in range(STARTS)]
        starts = [prior, torch.zeros_like(prior), *noise, *map(weights_of, policies)]
        lowest = [family.lowest(start) for start in starts]
        above = sorted(problem.kl(policy) - min(lowest) for policy in policies)
        each = ", ".join(f"{x:.3f}" for x in above)
        print(
            f"| {name} | {problem.kl(problem.lm):.2f} | {min(lowest):.4f} | {each} | "
            f"{statistics.median(seconds):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
