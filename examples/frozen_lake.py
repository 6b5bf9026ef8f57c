"""Control as inference on FrozenLake: an exact solution, variational inference, and planning.

    python examples/frozen_lake.py [folder] [--map 8x8]

An agent crosses a frozen lake; it moves in the chosen direction with probability 1/3 and slips to either side
otherwise. The prior policy is uniform, and the likelihood is exp(return / beta). `SoftValueIteration` computes the best
policy from the environment's tables; `SVI` and `ControlledSMC` play episodes only. Each policy is then evaluated
exactly, by E[return] - beta KL(policy || prior). The last row of the table is the policy of the posterior over
trajectories, which is optimistic: it assumes that the agent will rarely slip.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import matplotlib
import torch
from torch import Tensor

from bayeslm.inference import SVI
from bayeslm.inference.control import ControlledSMC, SoftValueIteration, StateValues
from bayeslm.inference.training import Adam, ReverseKL, Tempering
from bayeslm.models.control import MDP, Control, CountdownPolicy, TabularEnvironment

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BETA = 0.003
ARROWS = ((-1, 0), (0, -1), (1, 0), (0, 1))  # left, down, right, up: x to the right, y upwards


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)  # the computations are too small for several threads
    env = gymnasium.make("FrozenLake-v1", map_name=name)
    mdp, horizon = MDP.from_gymnasium(env), {"4x4": 100, "8x8": 200}[name]
    control = Control(TabularEnvironment(mdp), BETA, horizon)

    solver = SoftValueIteration(BETA, horizon)
    policies, took = {}, {}
    start = time.perf_counter()
    policies["exact"] = solver.run(mdp).policy
    took["exact"] = time.perf_counter() - start, 0

    policy = CountdownPolicy(mdp.num_states, mdp.num_actions, horizon)
    svi = SVI(
        num_steps=400,
        optimizer=Adam(0.2, schedule="cosine"),
        objective=ReverseKL(1000, StateValues(mdp.num_states)),
        callbacks=[Tempering(first=0.1, share=0.4)],
        guide=control.guide(policy),
        seed=0,
    )
    start = time.perf_counter()
    svi.run(control)
    policies["SVI"], took["SVI"] = policy.probabilities, (time.perf_counter() - start, svi.num_steps)

    planner = ControlledSMC(num_sweeps=8, num_particles=3000, dynamics="fixed", seed=0)
    start = time.perf_counter()
    planned = planner.run(control)
    policies["SMC"], took["SMC"] = planned.policy.probabilities, (time.perf_counter() - start, planner.num_sweeps)

    policies["optimistic"] = SoftValueIteration(BETA, horizon, dynamics="tilted").run(mdp).policy
    plain = SoftValueIteration(0.0, horizon)
    best = float(mdp.initial @ solver.run(mdp).values[0])
    print(f"FrozenLake {name}, beta = {BETA}, {horizon} steps: the best soft value is {best:.4f}\n")
    print(f"{'policy':10} {'soft value':>10} {'gap':>8} {'P(goal)':>8} {'iterations':>10} {'seconds':>8}")
    for label, found in policies.items():
        value = float(mdp.initial @ solver.evaluate(mdp, found)[0])
        goal = float(mdp.initial @ plain.evaluate(mdp, found)[0])
        seconds, iterations = took.get(label, (0.0, 0))
        gap = (best - value) / best
        print(f"{label:10} {value:10.4f} {gap:8.2%} {goal:8.3f} {iterations:10d} {seconds:8.1f}")

    folder.mkdir(parents=True, exist_ok=True)
    draw(env.unwrapped.desc, solver.run(mdp).values[0], policies).savefig(folder / "policies.png", dpi=150)
    print(f"\npolicies at the first step, and values of states: {folder / 'policies.png'}")


def draw(tiles, values: Tensor, policies: dict[str, Tensor]) -> plt.Figure:
    """Plot each policy at the first step as arrows, of length proportional to probability, over the states' values."""
    rows, columns = tiles.shape
    figure, axes = plt.subplots(1, len(policies), figsize=(3.4 * len(policies), 3.8), layout="constrained")
    for axis, (label, policy) in zip(axes, policies.items(), strict=True):
        shown = axis.imshow(values.reshape(rows, columns), cmap="Blues", vmin=0.0, vmax=1.0)
        for state, tile in enumerate(tiles.reshape(-1)):
            y, x = divmod(state, columns)
            if tile in (b"H", b"G"):
                axis.text(x, y, "hole" if tile == b"H" else "goal", ha="center", va="center", fontsize=40 / rows)
                continue
            for p, (right, up) in zip(policy[0, state].tolist(), ARROWS, strict=True):
                if p > 0.05:
                    axis.arrow(x, y, 0.28 * p * right, -0.28 * p * up, width=0.02, head_width=0.12, color="#D55E00")
        axis.set(title=label, xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    figure.colorbar(shown, ax=axes, label="soft value", shrink=0.8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/frozen_lake"))
    parser.add_argument("--map", choices=["4x4", "8x8"], default="4x4")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.map)
