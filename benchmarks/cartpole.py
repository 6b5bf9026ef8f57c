"""The environment steps and the seconds that SVI and stable-baselines3's PPO take to solve CartPole-v1.

    python benchmarks/cartpole.py [--seeds 3]

Solved is a mean return of at least 475 over 100 fresh episodes, with greedy actions. Policies are looked at in the same
way (`_cartpole.py`) once 2,000 environment steps or more have been taken since the last look; looks are not counted, as
steps or as seconds, nor are imports, and what only the first training does: each side begins with one that is thrown
away. One thread each, one side after the other.

PPO has the settings of rl-baselines3-zoo, or the library's defaults. It lives in an environment of its own, build/sb3,
made at the first run (1 GB). SVI trains a policy of the same size, two layers of 64 with tanh, on the program
`Control`, tau ~ uniform policy and exp(return / 0.1), by the gradient of the ELBO with a learned critic, 16 episodes a
step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _cartpole import GOAL, Watch
from _peer import Peer
from torch import Tensor

from bayeslm.inference import SVI, Critic, ReverseKL
from bayeslm.models.control import Control, GymEnvironment, MLPPolicy, actions

REQUIREMENTS = ["stable-baselines3==2.9.0", "gymnasium", "torch", "numpy"]
HORIZON = 500
BETA = 0.1
MOST_STEPS = 60  # gradient steps: half a million environment steps at most


def svi(seed: int, num_steps: int = MOST_STEPS) -> dict[str, Any]:
    environment = GymEnvironment("CartPole-v1")
    control = Control(environment, BETA, HORIZON)
    policy = MLPPolicy(environment, seed=seed)
    objective = ReverseKL(16, Critic())
    played = 0

    def act(observations: np.ndarray, greedy: bool) -> np.ndarray:
        with torch.no_grad():
            logits = policy(torch.from_numpy(observations), torch.zeros(len(observations), dtype=torch.long))
        return (logits.argmax(-1) if greedy else torch.distributions.Categorical(logits=logits).sample()).numpy()

    def solved(history: dict[str, list[np.ndarray]]) -> bool:
        nonlocal played
        assert objective.particles is not None
        played += int((actions(objective.particles.values["trajectory"]) >= 0).sum())
        return watch(played)

    engine = SVI(
        num_steps=num_steps,
        learning_rate=1e-2,
        schedule="constant",
        objective=objective,
        guide=control.guide(policy),
        stop=solved,
        num_samples=1,
        seed=seed,
        progress=False,
    )
    watch = Watch(act, seed)
    engine.run(control)
    return watch.result()
