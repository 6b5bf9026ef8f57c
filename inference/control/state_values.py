r"""A table of soft values: the baseline of trajectories through finitely many states.

With f = \sum_t (r_t / \beta + log p(a_t | s_t) - log q(a_t | s_t)) of a trajectory, the gradient of the ELBO is

    \nabla L  =  E_q[ \sum_t (f_{\geq t} - V_t(s_t)) \nabla log q(a_t | s_t) ],     f_{\geq t} = \sum_{k \geq t} ...,

since neither the terms of earlier steps nor any V_t(s_t) has covariance with the score of a_t. The best such V is the
soft value of the policy over \beta, V_t(s) = E_q[f_{\geq t} | s_t = s] (Levine 2018, arXiv 1805.00909, section 3). It
is estimated by a running mean for each state and part of the horizon, of the steps before: the gradient is unbiased.

The terms of earlier steps are known where the program has a factor for each step, in a plate ``steps``, as `Control`
does. A factor of the complete trajectory belongs to all of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from bayeslm.inference.program import ProgramError, ranks
from bayeslm.inference.training import EMPTY, State, Texts, leave_one_out
from bayeslm.validation import Count, Within, validated


@validated
@dataclass(frozen=True)
class StateValues:
    """`ReverseKL`'s baseline of trajectories through discrete states; other latents have leave-one-out.

    :param num_states: S, of the environment.
    :param parts: of the horizon, each with values of its own.
    :param decay: the weight of the earlier steps, in [0, 1).
    :raises ValueError: if a setting is out of range.
    """

    num_states: Count
    parts: Count = 10
    decay: Annotated[float, Within("[0, 1)")] = 0.9

    def __call__(
        self, name: str, f: Tensor, prompts: Tensor | None = None, state: State = EMPTY
    ) -> tuple[Tensor, State]:
        """Return the advantage (particle, prompt) of a latent that is no trajectory, and the next state."""
        return leave_one_out(name, f, prompts, state)

    def of_tokens(self, name: str, f: Tensor, texts: Texts, state: State = EMPTY) -> tuple[Tensor, State]:
        """Return the advantages (particle, prompt, text, step) of a trajectory by what was learned before; then learn.

        The state holds a ``table`` (2, parts * S): the values, and of how many visits they are.

        :param f: (particle, prompt), or (particle, 1).
        :raises ProgramError: if its environment has another number of states.
        """
        width = texts.hidden.shape[-1]  # of a trajectory: a state, one-hot, the time and the return so far
        if width != self.num_states + 2:
            raise ProgramError(
                f"StateValues({self.num_states}): site {name!r} is no trajectory through so many states: what is "
                f"known before an action has {width} numbers, and would have {self.num_states + 2}; give it "
                "environment.num_states, or use Critic where states are not discrete"
            )
        to_go = f[:, :, None, None] - texts.past - texts.earned
        horizon = to_go.shape[-1]
        part = torch.arange(horizon, device=to_go.device) * self.parts // horizon
        cell = (part * self.num_states + texts.hidden[..., : self.num_states].argmax(-1))[texts.live]
        values, visits = state.get("table", to_go.new_zeros(2, self.parts * self.num_states))
        advantage = torch.zeros_like(to_go)
        surprise = to_go[texts.live] - values[cell]
        advantage[texts.live] = surprise
        each = torch.stack([torch.ones_like(surprise), surprise])
        count, surprises = ranks().total(to_go.new_zeros(2, len(values)).index_add_(1, cell, each))
        visits = self.decay * visits + count
        values = values + surprises / visits.clamp_min(1.0)
        return advantage, {"table": torch.stack([values, visits])}
