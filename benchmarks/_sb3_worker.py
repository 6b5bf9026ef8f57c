"""CartPole-v1 by stable-baselines3's PPO, until it is solved; runs in an environment of its own (see `_peer.py`)."""

from __future__ import annotations

from typing import Any

import torch
from _cartpole import Watch
from _peer import serve
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

# rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1; its rates fall linearly to 0 over the budget, there 100,000 steps
ZOO: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "ent_coef": 0.0,
    "learning_rate": lambda left: 1e-3 * left,
    "clip_range": lambda left: 0.2 * left,
}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {"zoo": (8, ZOO), "defaults": (1, {})}  # environments, arguments


class Until(BaseCallback):
    """Looks between an update and the next rollout, and stops at the goal."""

    def __init__(self, greedy: bool, seed: int) -> None:
        super().__init__()
        self._looks = greedy, seed
        self._solved = False

    def _on_rollout_start(self) -> None:
        if self.num_timesteps == 0:
            self.watch = Watch(lambda seen, greedy: self.model.predict(seen, deterministic=greedy)[0], *self._looks)
        else:
            self._solved = self.watch(self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._solved


def train(settings: str, greedy: bool, seed: int, threads: int, budget: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    num_envs, given = SETTINGS[settings]
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", num_envs, seed=seed), seed=seed, device="cpu", **given)
    until = Until(greedy, seed)
    model.learn(budget, callback=until)
    return until.watch.result()


if __name__ == "__main__":
    serve(train)
