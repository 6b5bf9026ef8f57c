"""Reinforcement learning in unknown worlds: regret of posterior sampling, epsilon-greedy and random exploration.

    python examples/psrl.py [runs/psrl]

There are three worlds: a bandit with five arms, RiverSwim, whose reward lies against the current, and FrozenLake. The
agent observes states and rewards only, and its belief is a posterior over transitions and rewards in closed form. PSRL
draws a world from the posterior, acts by its best policy for an episode, and updates the posterior. The other
strategies act on the mean world. The script prints the regret and plots it to regret.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bayeslm.inference.control import PSRL, EpisodicTask, EpsilonGreedy, Random, Thompson
from bayeslm.models.control import MDP, Bandit, BernoulliArms, TabularEnvironment, Worlds, river_swim
from bayeslm.plots import plot_regret

STRATEGIES = {
    "PSRL": Thompson(),
    "greedy": EpsilonGreedy(0.0),
    "epsilon-greedy, 0.1": EpsilonGreedy(0.1),
    "random": Random(),
}


def episodic(mdp: MDP, horizon: int) -> tuple[EpisodicTask, Worlds]:
    """Return the task, and a prior of few next states for each state, and rewards near 0 with little noise."""
    prior = Worlds.prior(
        mdp.num_states, mdp.num_actions, concentration=0.1 / mdp.num_states, reward=(0.0, 0.01, 2.0, 1e-4)
    )
    return EpisodicTask(TabularEnvironment(mdp), horizon), prior


def main(folder: Path) -> None:
    lake = MDP.from_gymnasium(gymnasium.make("FrozenLake-v1"))
    arms = torch.tensor([0.9, 0.8, 0.7, 0.5, 0.3])
    worlds = {
        "Bandit, 5 arms": (Bandit(arms), BernoulliArms.prior(5), 1000),
        "RiverSwim": (*episodic(river_swim(), 20), 200),
        "FrozenLake 4x4": (*episodic(lake, 100), 300),
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, (name, (task, prior, episodes)) in zip(axes, worlds.items(), strict=True):
        regrets = {}
        print(f"\n{name}: regret of {episodes} episodes, mean of 20 runs")
        for label, strategy in STRATEGIES.items():
            regrets[label] = PSRL(episodes, strategy, num_runs=20, seed=0).run(task, prior).regret
            total = regrets[label].sum(1)
            print(f"  {label:20} {total.mean():8.2f} ± {total.std() / len(total) ** 0.5:.2f}")
        plot_regret(regrets, axis=axis, label="pull" if "Bandit" in name else "episode")
        axis.set_title(name)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "regret.png", dpi=150)
    print(f"\nregret: {folder / 'regret.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/psrl"))
