"""Balance a pole by variational inference: reinforcement learning as the search for a posterior.

    python examples/cartpole.py [folder]

The prior policy acts at random and keeps the pole up for about 22 steps. The likelihood is exp(return / beta). `SVI`
trains a neural policy towards the posterior, in 40 gradient steps on 16 episodes each, which takes half a minute. The
script prints the mean return of 100 episodes and plots the learning curve into the folder (default: runs/cartpole).
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, Critic, ReverseKL
from bayeslm.models.control import Control, GymEnvironment, MLPPolicy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HORIZON = 500


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # the networks are too small for several threads
    environment = GymEnvironment("CartPole-v1")
    control = Control(environment, beta=0.1, horizon=HORIZON)
    policy = MLPPolicy(environment)
    svi = SVI(
        num_steps=40,
        optimizer=Adam(1e-2),
        objective=ReverseKL(16, Critic()),
        guide=control.guide(policy),
        num_samples=100,
        seed=0,
    )
    posterior = svi.run(control)

    curve = posterior.stats["reward"][0, :, 0]  # mean return of the episodes of each gradient step
    played = np.cumsum(16 * curve)  # each step of the environment has reward 1, so returns count steps
    print(f"random policy:  mean return of 100 episodes {posterior.prior['score'].mean():6.1f}")
    print(f"trained policy: mean return of 100 episodes {posterior.rewards['reward'].mean():6.1f}")
    seconds = posterior.stats["seconds"]
    print(f"after {len(curve)} gradient steps with {played[-1]:,.0f} environment steps, in {seconds:.0f} s")

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(played, curve)
    axes.axhline(475, linestyle=":", color="grey", label="solved: 475")
    axes.set(xlabel="environment steps", ylabel="mean return of 16 episodes", ylim=(0, HORIZON * 1.02))
    axes.legend(loc="lower right")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "learning_curve.png", dpi=150)
    print(f"learning curve: {folder / 'learning_curve.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/cartpole"))
