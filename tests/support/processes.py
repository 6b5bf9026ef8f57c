"""Small random Markov decision processes, and the enumeration of their episodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bayeslm.models.control import MDP


def random_mdp(seed: int = 0, states: int = 4, actions: int = 2, *, deterministic: bool = False) -> MDP:
    """Return random transitions and rewards; the last state is terminal, and no episode begins there."""
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.rand(states, actions, states, generator=generator, dtype=torch.float64) ** 3
    if deterministic:
        transitions = torch.nn.functional.one_hot(transitions.argmax(-1), states).double()
    transitions = transitions / transitions.sum(-1, keepdim=True)
    rewards = torch.randn(states, actions, states, generator=generator, dtype=torch.float64)
    initial = torch.rand(states, generator=generator, dtype=torch.float64)
    initial[-1] = 0.0
    return MDP(transitions, rewards, torch.arange(states) == states - 1, initial / initial.sum())


def all_episodes(mdp: MDP, start: int, horizon: int) -> Iterator[tuple[float, list[tuple[int, int, float]]]]:
    """Yield every possible episode: the product of its transition probabilities, and its steps (s, a, r)."""
    for actions in itertools.product(range(mdp.num_actions), repeat=horizon):
        yield from _episodes(mdp, start, actions)


def _episodes(mdp: MDP, state: int, actions: tuple[int, ...]) -> Iterator[tuple[float, list[tuple[int, int, float]]]]:
    if not actions or mdp.terminal[state]:
        if all(a == 0 for a in actions):  # all continuations of a finished episode are counted once
            yield 1.0, []
        return
    for next_state in range(mdp.num_states):
        p = float(mdp.transitions[state, actions[0], next_state])
        if p == 0.0:
            continue
        step = (state, actions[0], float(mdp.rewards[state, actions[0], next_state]))
        for rest, steps in _episodes(mdp, next_state, actions[1:]):
            yield p * rest, [step, *steps]


def random_policy(mdp: MDP, seed: int = 0, horizon: int | None = None) -> Tensor:
    """Return logits (S, A), or (horizon, S, A), that are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*(() if horizon is None else (horizon,)), mdp.num_states, mdp.num_actions)
    return torch.randn(shape, generator=generator)
