"""What exploration costs: cumulative regret of posterior sampling, of epsilon-greedy tuned over epsilon, and of chance.

    python benchmarks/psrl.py [--runs 20] [--seed 1] [--tasks frozen-lake-4x4 cliff-walking ...] [--out runs/psrl]

All learn the same belief over an unknown process, from states and rewards alone: PSRL solves a world drawn from it for
each episode, epsilon-greedy the mean world. Episodes have the environment's time limit; CliffWalking has none, and is
given 100 steps. The regret is exact: V* less the value of each episode's policy in the true world.

The prior of next states is a Dirichlet of 0.1 observations' worth in all: few successors. That of rewards is a
normal-gamma of mean m, worth 0.01 observations, with noise of about 0.01. m is 0; for CliffWalking, where every step
costs 1, also -1: with 0 every unknown action appears good there, and greedy explores by itself. The prior was chosen
among some ten by their regret in runs of seed 0; these are others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import numpy as np
from numpy.typing import NDArray

from bayeslm.inference.control import PSRL, EpisodicTask, EpsilonGreedy, Exploration, Random, Thompson
from bayeslm.models.control import MDP, TabularEnvironment, Worlds, river_swim
from bayeslm.plots import plot_regret

TASKS: dict[str, tuple[str | None, int, int, float]] = {  # environment, horizon, episodes, prior mean of a reward
    "river-swim": (None, 20, 500, 0.0),
    "frozen-lake-4x4": ("FrozenLake-v1", 100, 500, 0.0),
    "frozen-lake-8x8": ("FrozenLake8x8-v1", 200, 500, 0.0),
    "cliff-walking": ("CliffWalking-v1", 100, 1000, -1.0),
    "cliff-walking, m = 0": ("CliffWalking-v1", 100, 300, 0.0),
}
EPSILONS = (0.0, 0.01, 0.05, 0.2)


def process(name: str | None) -> MDP:
    return river_swim() if name is None else MDP.from_gymnasium(gymnasium.make(name))


def prior(mdp: MDP, mean: float) -> Worlds:
    return Worlds.prior(
        mdp.num_states, mdp.num_actions, concentration=0.1 / mdp.num_states, reward=(mean, 0.01, 2.0, 1e-4)
    )


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Of the means of independent runs, with its standard error (delta method)."""
    value = a.mean() / b.mean()
    relative = [x.var(ddof=1) / len(x) / x.mean() ** 2 for x in (a, b)]
    return float(value), float(abs(value) * np.sqrt(sum(relative)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the pictures")
    options = parser.parse_args()
    for name in options.tasks:
        environment, horizon, episodes, mean = TASKS[name]
        mdp = process(environment)
        task = EpisodicTask(TabularEnvironment(mdp), horizon)
        assert task.optimum is not None
        strategies: dict[str, Exploration] = {"PSRL": Thompson()}
        strategies |= {f"epsilon {epsilon:g}": EpsilonGreedy(epsilon) for epsilon in EPSILONS}
        strategies["random"] = Random()
        print(f"\n{name}: V* {float(task.optimum):.3f}, {episodes} episodes of {horizon} steps, {options.runs} runs\n")
        print("| strategy | regret at a tenth | at a half | at the end | last tenth, an episode | seconds |")
        print("|---|---|---|---|---|---|")
        regrets = {}
        for label, strategy in strategies.items():
            start = time.perf_counter()
            learning = PSRL(episodes, strategy, options.runs, seed=options.seed).run(task, prior(mdp, mean))
            seconds = time.perf_counter() - start
            regrets[label] = regret = learning.regret.numpy()
            total = regret.cumsum(1)[:, [episodes // 10 - 1, episodes // 2 - 1, episodes - 1]]
            stderr = (total.std(0, ddof=1) / np.sqrt(options.runs)).round(9)  # chance's regret has none
            columns = " | ".join(f"{x:.4g} ± {e:.2g}" for x, e in zip(total.mean(0), stderr, strict=True))
            print(f"| {label} | {columns} | {regret[:, -episodes // 10 :].mean():.3g} | {seconds:.0f} |", flush=True)
        best = min((label for label in regrets if label.startswith("epsilon")), key=lambda x: regrets[x].sum(1).mean())
        value, error = ratio(regrets["PSRL"].sum(1), regrets[best].sum(1))
        print(f"\nPSRL's regret is {value:.2f} ± {error:.2f} of the best epsilon-greedy's ({best})")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            shown = {label: regrets[label] for label in ("PSRL", best, "epsilon 0.2", "random")}
            plot_regret(shown).savefig(options.out / f"{name.replace(', m = ', '-')}.png", dpi=150)


if __name__ == "__main__":
    main()
