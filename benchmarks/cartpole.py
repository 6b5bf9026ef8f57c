"""The environment steps and the seconds that SVI and stable-baselines3's PPO take to solve CartPole-v1.

    python benchmarks/cartpole.py [--seeds 3]

Solved is a mean return of at least 475 over 100 fresh episodes: of the policy's likeliest actions ("greedy") and, in
trainings of their own, of actions drawn from it. Policies are evaluated in the same way (`_cartpole.py`), at least
2,000 environment steps apart. Evaluations are not counted, as steps or as seconds, nor are imports and the work of a
first training: each side begins with one that is discarded. One thread each, one side after the other; a training that
is not solved by 100,000 environment steps has failed.

PPO has the settings of rl-baselines3-zoo, or the library's defaults. It lives in an environment of its own, build/sb3,
made at the first run (1 GB). SVI trains a policy of the same size, two layers of 64 with tanh, on the program
`Control`, tau ~ uniform policy and exp(return / 0.1), by the gradient of the ELBO with a learned critic, 16 episodes a
step.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _cartpole import GOAL, Watch
from _peer import Peer

from bayeslm.inference import SVI
from bayeslm.inference.training import Adam, Critic, Reply, ReverseKL, StepRecord
from bayeslm.models.control import Control, GymEnvironment, MLPPolicy, actions

REQUIREMENTS = ["stable-baselines3==2.9.0", "gymnasium", "torch", "numpy"]
HORIZON = 500
BETA = 0.1
BUDGET = 100_000  # environment steps of a training, as rl-baselines3-zoo has it: its rates fall to 0 over these
EPISODES = 16  # of a gradient step


def svi(greedy: bool, seed: int, budget: int = BUDGET) -> dict[str, Any]:
    environment = GymEnvironment("CartPole-v1")
    control = Control(environment, BETA, HORIZON)
    policy = MLPPolicy(environment, seed=seed)
    objective = ReverseKL(EPISODES, Critic())
    played = 0

    def act(observations: np.ndarray, greedy: bool) -> np.ndarray:
        with torch.no_grad():
            logits = policy(torch.from_numpy(observations), torch.zeros(len(observations), dtype=torch.long))
        return (logits.argmax(-1) if greedy else torch.distributions.Categorical(logits=logits).sample()).numpy()

    def solved(record: StepRecord) -> Reply:
        nonlocal played
        if record.particles is None:  # before the first step
            return Reply()
        played += int((actions(record.particles.values["trajectory"]) >= 0).sum())
        return Reply(stop=watch(played) or played >= budget)

    engine = SVI(
        num_steps=math.ceil(budget / EPISODES),  # more than it takes to spend the budget
        optimizer=Adam(1e-2, schedule="constant"),
        objective=objective,
        guide=control.guide(policy),
        callbacks=[solved],
        num_samples=1,
        seed=seed,
        progress=False,
    )
    watch = Watch(act, greedy, seed)
    engine.run(control)
    return watch.result()


def report(name: str, train: Callable[[bool, int], dict[str, Any]], greedy: bool, seeds: int) -> tuple[float, float]:
    """Rows of the table, a seed each; gives the medians of environment steps and of seconds to the goal."""
    steps, seconds = [], []
    for seed in range(seeds):
        result = train(greedy, seed)
        played, took, found = result["curve"][-1]
        reached = found >= GOAL
        steps.append(played if reached else math.inf)
        seconds.append(took if reached else math.inf)
        cells = [f"{played:,}", f"{took:.2f}", f"{found:.1f}", f"{result['again']:.1f}"]
        print(f"| {name} | {'greedy' if greedy else 'drawn'} | {seed} | {' | '.join(cells)} |", flush=True)
    return statistics.median(steps), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    peer = Peer("sb3", REQUIREMENTS, "_sb3_worker.py")

    def ppo(settings: str, greedy: bool, seed: int, budget: int = BUDGET) -> dict[str, Any]:
        return peer.ask({"settings": settings, "greedy": greedy, "seed": seed, "threads": 1, "budget": budget})

    svi(greedy=True, seed=0, budget=1)
    ppo("zoo", greedy=True, seed=0, budget=1)
    print("| | actions | seed | environment steps | seconds | mean return | again |")
    print("|---|---|---|---|---|---|---|")
    medians: list[str] = []
    for greedy in (True, False):
        steps, seconds = report("SVI", svi, greedy, seeds)
        medians.append(f"\n{'Greedy' if greedy else 'Drawn'} actions, medians: SVI {steps:,.0f} steps, {seconds:.2f} s")
        for settings in ("zoo", "defaults"):
            name = f"PPO, {settings}"
            others, took = report(name, functools.partial(ppo, settings), greedy, seeds)
            ratios = f"SVI took {steps / others:.2f} of the steps, {seconds / took:.2f} of the seconds"
            medians.append(f"{name}: {others:,.0f} steps, {took:.2f} s; {ratios}")
    peer.close()
    print("\n".join(medians))


if __name__ == "__main__":
    main()
