"""How noisy the gradients of objectives are, and how near to a known posterior they lead for equally many samples.

    python benchmarks/variance.py [--particles 32] [--steps 150] [--repeats 150] [--seeds 3]

Three of `svi_trl.py`'s problems, which are enumerable. A policy is trained by `ReverseKL` with leave-one-out; at three
points of it, each objective's gradient is estimated so many times from as many particles, and the trace of the
estimates' covariance given over the squared norm of the ELBO's own gradient, by enumeration. The critic has learned
along the training, from the same number of particles; once more it learns from so many further steps of the policy as
it then is. Draws of the prior give another gradient (of the log-variance under the prior), whose norm, by the mean of
the estimates, is not known as well: theirs is over the same squared norm. Then each trains by itself from the start.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from svi_trl import PROMPT, TOKENS, Problem, count, pairs, position
from torch import Tensor

from bayeslm.inference import MCMC, SVI
from bayeslm.inference.training import (
    Adam,
    Critic,
    ExponentialAverage,
    FromPosterior,
    LogVariance,
    Replay,
    ReverseKL,
    State,
    StatefulLoss,
    StepRecord,
    Tempering,
    of_prior,
)
from bayeslm.models import LanguageModel

RATE = 3e-3


def no_baseline(name: str, f: Tensor, prompts: Tensor | None, state: State) -> tuple[Tensor, State]:
    return f, state


def guide_of(policy: LanguageModel) -> Callable[..., None]:
    def guide(prompts: list[list[int]]) -> None:
        pyro.module("policy", policy)
        with pyro.plate("prompts", len(prompts)):
            pyro.sample("completion", policy(prompts, TOKENS))

    return guide


def true_gradient(problem: Problem, policy: LanguageModel) -> Tensor:
    """Of KL(q || posterior), flat."""
    log_q = policy([PROMPT], TOKENS).log_prob(problem.values)[:, 0]
    worth = (log_q.double() - problem.log_posterior).detach().float()
    loss = (log_q.exp() * worth).sum()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained(policy))])


def trained(policy: LanguageModel) -> list[Tensor]:
    return [p for p in policy.network.parameters() if p.requires_grad]


def gradients(
    problem: Problem, policy: LanguageModel, loss: StatefulLoss, repeats: int, *, learns: bool = False, first: int = 0
) -> Tensor:
    """Return estimates (repeat, coordinate) with seeds from ``first`` on.

    Each begins with what the objective had learned before, unless it ``learns``.
    """
    state = loss.state
    rows = []
    for seed in range(repeats):
        torch.manual_seed(first + seed + 10_000 * learns)
        for p in trained(policy):
            p.grad = None
        if not learns:
            loss.state = state
        with pyro.get_param_store().scope():
            loss.loss_and_grads(problem.model, guide_of(policy), [PROMPT])
        rows.append(torch.cat([p.grad.reshape(-1) for p in trained(policy)]))  # type: ignore[union-attr]
    return torch.stack(rows)


def train(problem: Problem, objective: Any, steps: int, seed: int, callbacks: Sequence[Any] = ()) -> LanguageModel:
    engine = SVI(
        num_steps=steps,
        optimizer=Adam(RATE),
        objective=objective,
        callbacks=callbacks,
        num_samples=1,
        seed=seed,
        progress=False,
    )
    policy: LanguageModel = engine.run(problem.model, [PROMPT]).policy
    return policy


def variances(problem: Problem, n: int, steps: int, repeats: int) -> None:
    points: list[tuple[int, LanguageModel, dict[str, Any]]] = []
    baselines = {"exponential average": ExponentialAverage(), "critic": Critic()}
    learning = {name: StatefulLoss(ReverseKL(n, baseline)) for name, baseline in baselines.items()}

    def watch(record: StepRecord) -> None:
        if record.step in (steps // 15, steps // 3, steps):
            states = {name: loss.state for name, loss in learning.items()}
            points.append((record.step, copy.deepcopy(record.policy), states))
        for loss in learning.values():  # they learn from the policy of each step, which does not learn from them
            if record.step < steps:
                gradients(problem, copy.deepcopy(record.policy), loss, 1, learns=True, first=record.step)

    train(problem, ReverseKL(n), steps, 0, [watch])
    rows: dict[str, list[str]] = {}
    for _, policy, states in points:
        g = true_gradient(problem, policy)
        objectives = {
            "no baseline": ReverseKL(n, no_baseline),
            "exponential average": ReverseKL(n, ExponentialAverage()),
            "leave-one-out": ReverseKL(n),
            "critic": ReverseKL(n, Critic()),
            "critic, after more steps at this policy": ReverseKL(n, Critic()),
            "log-variance, the policy's draws": LogVariance(n),
            "log-variance, the prior's draws": LogVariance(n, of_prior),
        }
        losses = {name: StatefulLoss(objective) for name, objective in objectives.items()}
        for name, state in states.items():
            losses[name].state = state
        later = losses["critic, after more steps at this policy"]
        later.state = states["critic"]
        gradients(problem, policy, later, steps, learns=True)
        for name, loss in losses.items():
            spread = gradients(problem, policy, loss, repeats).var(0).sum() / (g @ g)
            rows.setdefault(name, []).append(f"{float(spread):.3g}")
    kls = ", ".join(f"{problem.kl(policy):.2f}" for _, policy, _ in points)
    print(f"\n{problem.name}, {n} particles: trace of the covariance over |g|^2, at KLs of {kls}\n")
    print("| objective | " + " | ".join(f"step {done}" for done, _, _ in points) + " |")
    print("|---" * (1 + len(points)) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def reached(problem: Problem, n: int, steps: int, seeds: int) -> None:
    chains = MCMC(num_samples=steps, num_chains=n, warmup=20, seed=0, progress=False)
    makers: dict[str, Callable[[], Any]] = {
        "no baseline": lambda: ReverseKL(n, no_baseline),
        "exponential average": lambda: ReverseKL(n, ExponentialAverage()),
        "leave-one-out": lambda: ReverseKL(n),
        "critic": lambda: ReverseKL(n, Critic()),
        "log-variance, the prior's draws": lambda: LogVariance(n, of_prior),
        "log-variance, new draws every 4th step": lambda: LogVariance(n, Replay(every=4)),
        "log-variance, MCMC's states": lambda: LogVariance(n, FromPosterior(chains.run(problem.model, [PROMPT]))),
    }
    temperings = {
        "leave-one-out, tempered from 0.1 over a quarter": Tempering(0.1, 0.25),
        "leave-one-out, tempered from 0.3 over a quarter": Tempering(0.3, 0.25),
        "leave-one-out, tempered from 0.1 over a half": Tempering(0.1, 0.5),
    }
    makers |= dict.fromkeys(temperings, makers["leave-one-out"])
    print(f"\n{problem.name}: KL to the posterior after {steps} steps of {n}, median; min to max of {seeds}\n")
    print("| objective | KL |\n|---|---|")
    for name, make in makers.items():
        warm = [temperings[name]] if name in temperings else []
        kls = [problem.kl(train(problem, make(), steps, seed, callbacks=warm)) for seed in range(seeds)]
        print(f"| {name} | {statistics.median(kls):.3f}; {min(kls):.3f} to {max(kls):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"particles": 32, "steps": 150, "repeats": 150, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    for problem in (Problem(position, 0, 1.0), Problem(pairs, 1, 1.0), Problem(count, 2, 0.3)):
        variances(problem, options.particles, options.steps, options.repeats)
        reached(problem, options.particles, options.steps, options.seeds)


if __name__ == "__main__":
    main()
