"""RiverSwim: a chain whose far end pays, against the current; the small world in which exploring at random fails.

(Strehl and Littman 2008, doi 10.1016/j.jcss.2007.08.009; the figures of Osband, Russo and Van Roy 2013.)
"""

from __future__ import annotations

import torch

from .mdp import MDP

LEFT, RIGHT = 0, 1


def river_swim(num_states: int = 6) -> MDP:
    """Swimming left, with the current, always goes; swimming right goes on with probability 0.35, and at times back.

    The left bank pays 0.005 to who swims left there, the right bank 1 to who swims right. Episodes begin at the left.

    :raises ValueError: if there are fewer than 3 states.
    """
    if num_states < 3:
        raise ValueError(f"river_swim: need at least 3 states, got {num_states}")
    last = num_states - 1
    transitions = torch.zeros(num_states, 2, num_states, dtype=torch.float64)
    rewards = torch.zeros_like(transitions)
    for s in range(num_states):
        transitions[s, LEFT, max(s - 1, 0)] = 1.0
        back, stay, on = (0.0, 0.4, 0.6) if s == 0 else (0.4, 0.6, 0.0) if s == last else (0.05, 0.6, 0.35)
        for following, p in ((s - 1, back), (s, stay), (s + 1, on)):
            if p > 0:
                transitions[s, RIGHT, following] = p
    rewards[0, LEFT] = 0.005
    rewards[last, RIGHT] = 1.0
    initial = torch.zeros(num_states, dtype=torch.float64)
    initial[0] = 1.0
    return MDP(transitions, rewards, torch.zeros(num_states, dtype=torch.bool), initial)
