r"""A critic: a baseline for every token, learned on the hidden states of the prior, for the gradient of the ELBO.

With f = log p(x) + l(x) - log q(x) of a whole text, the score-function gradient token by token is

    \nabla L  =  E_q[ \sum_t (f - U_t(x_{<t})) \nabla log q(x_t | x_{<t}) ]

for every U_t, since what is known before x_t has no covariance with its score. The critic learns U_t(x_{<t}) =
E_q[f | x_{<t}], the value function of KL-regularised reinforcement learning (Levine 2018, arXiv 1805.00909; the
actor-critic of Sutton, McAllester, Singh and Mansour 2000), by regression: it minimises E_q[(f - U_t)^2].

Textbooks take the return to go, f_t = f - \sum_{s<t} (log p_s - log q_s), less V_t(x_{<t}). With V_t = U_t -
\sum_{s<t} (...) that is the same, but the past is better left in: at the posterior f is log Z for every text, so that
U_t is that constant and the variance is 0, while V_t would have to undo the past of every single text. (By
enumeration, returns to go less their mean had up to 3.8 times the variance of f less its mean near a posterior.)

Two baselines are added: U_t less its own mean is the critic's, and the level is left to the other texts of the same
prompt (leave-one-out),

    A_{i,t}  =  (f_i - U_{i,t})  -  mean of f_j - U_{j,s} over the tokens s of all particles j other than i

which depends on x_{i,t} through f_i alone. U begins as 0, which is the plain leave-one-out baseline, and the loss is
the mean of A^2 itself.

A trajectory is read as a completion is: its tokens are actions, the prior's hidden state is what is known before an
action, the observation, the time and the return so far. U_t is then that return over beta plus a state's soft value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from bayeslm.inference.program import Program, check_counts, check_positive

from .baselines import ExponentialAverage, leave_one_out


@runtime_checkable
class Readable(Protocol):
    """A law of what is drawn step by step: `Autoregressive`, or that of a trajectory, whose tokens are actions."""

    def token_log_prob(self, value: Tensor) -> Tensor:
        """log-probabilities (*batch, token), 0 on padding."""

    def token_log_prob_and_hidden(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same without gradient, and what is known before each token, (*batch, token, width)."""

    def lengths(self, value: Tensor) -> Tensor:
        """Tokens before the padding, (*batch,)."""


@dataclass
class Texts:
    """Completions of a site as the critic reads them, without gradient.

    ``hidden`` (particle, prompt, text, token, width) before each token; ``past`` (particle, prompt, text, token),
    \\sum_{s<t} log p(x_s) - log q(x_s); ``live``, of the same shape: which tokens are not padding; ``earned``, what
    factors of the tokens before, in a plate `STEPS`, add up to, (particle, prompt, text or 1, token). A prompt has one
    text, or more in a plate of its own. ``prompts`` are the indices of a minibatch's.
    """

    hidden: Tensor
    past: Tensor
    live: Tensor
    earned: Tensor
    prompts: Tensor | None = None


class Critic:
    """`ReverseKL`'s baseline of completions. Other latents have leave-one-out, or an average if there is one particle.

    :param learning_rate: of its Adam.
    :param num_steps: of Adam on the texts of each step, once their advantages are taken.
    :param width: of the head's one hidden layer.

    A head for each completion site. What it has learned is kept (`state_dict`) until `reset`.
    """

    def __init__(self, learning_rate: float = 3e-3, num_steps: int = 1, width: int = 32) -> None:
        self.learning_rate, self.num_steps, self.width = learning_rate, num_steps, width
        check_counts(self, "num_steps", "width")
        check_positive(self, "learning_rate")
        self._average = ExponentialAverage()  # the level, where there is no other particle
        self._sites: dict[str, _Learner] = {}

    def __call__(self, name: str, f: Tensor, prompts: Tensor | None = None) -> Tensor:
        """The advantage (particle, prompt) of a latent that is no completion."""
        return leave_one_out(name, f) if len(f) > 1 else self._average(name, f, prompts)

    def of_tokens(self, name: str, f: Tensor, texts: Texts) -> Tensor:
        """The advantages (particle, prompt, text, token) of a completion, by what was learned before; then learn.

        :param f: (particle, prompt), or (particle, 1).
        """
        if not texts.live.any():
            return torch.zeros_like(texts.past)  # nobody acted: there is nothing to credit, nor to learn
        level = f if len(f) > 1 else self._average(name, f, texts.prompts)
        if name not in self._sites:
            self._sites[name] = _Learner(_Head.reading(texts, self.width), self.learning_rate)
        return self._sites[name].learn(level[:, :, None, None], texts, self.num_steps)

    # -- what is remembered --------------------------------------------------------------------------------------

    def reset(self, program: Program) -> None:
        """Forget the steps before: another training begins."""
        self._average.reset(program)
        self._sites.clear()

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"average::{name}": value for name, value in self._average.state_dict().items()}
        for name, learner in self._sites.items():
            state |= {f"{key}:{name}": value for key, value in learner.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        of: dict[str, dict[str, Tensor]] = {}
        averages = {}
        for key, value in state.items():
            part, entry, name = key.split(":", 2)  # sites' names may have colons of their own
            if part == "average":
                averages[name] = value
            else:
                of.setdefault(name, {})[f"{part}:{entry}"] = value
        self._average.load_state_dict(averages)
        self._sites = {name: _Learner.from_state(entries, self.learning_rate) for name, entries in of.items()}


class _Head(nn.Module):
    """U_t of texts of T tokens, in units of f's spread and from 0 on: of the hidden state before x_t, what earlier ones
    add up to (which a last state has long forgotten), t, and the past."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden_width: int, tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_width))
        self.register_buffer("deviation", torch.ones(hidden_width))
        # The same every time: a training that goes on from a file must not draw other random numbers.
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[0] ** 0.5)

        self.earlier = normal(hidden_width, width)
        self.inner = normal(hidden_width + width + 1, width)
        self.inner_bias = nn.Parameter(torch.zeros(tokens, width))
        self.out = nn.Parameter(torch.zeros(width))
        self.out_bias = nn.Parameter(torch.zeros(tokens))
        self.belief = nn.Parameter(torch.zeros(tokens))  # in the past

    @classmethod
    def reading(cls, texts: Texts, width: int) -> _Head:
        """One for texts such as these, whose hidden states it scales by."""
        head = cls(texts.hidden.shape[-1], texts.hidden.shape[-2], width).to(texts.hidden.device)
        head.follow(texts, decay=0.0)
        return head

    @torch.no_grad()
    def follow(self, texts: Texts, decay: float) -> None:
        """Scale by averages of the steps before: states of a policy that learns to live longer move far."""
        rows = texts.hidden[texts.live].float()
        deviation = rows.std(0, correction=0).clamp_min(1e-3 * float(rows.std(correction=0)) + 1e-12)
        self.mean.lerp_(rows.mean(0), 1.0 - decay)
        self.deviation.lerp_(deviation, 1.0 - decay)

    def forward(self, hidden: Tensor, past: Tensor) -> Tensor:
        """(..., token), of hidden (..., token, width) and past (..., token)."""
        hidden = (hidden.float() - self.mean) / self.deviation
        earlier = gelu(hidden @ self.earlier).cumsum(-2) / len(self.out_bias) ** 0.5
        inner = torch.cat([hidden, earlier, past[..., None]], -1) @ self.inner + self.inner_bias
        return gelu(inner) @ self.out + self.belief * past + self.out_bias


class _Learner:
    """A head, its Adam, and the spread of f, an average of the steps before."""

    def __init__(self, head: _Head, learning_rate: float) -> None:
        self._head = head
        self._adam = torch.optim.Adam(head.parameters(), learning_rate)
        self._variance: Tensor | None = None

    def learn(self, f: Tensor, texts: Texts, num_steps: int) -> Tensor:
        """The advantages (particle, prompt, text, token); then so many steps of Adam."""
        with torch.no_grad():
            now = _advantages(f.expand(texts.past.shape), texts.live)[texts.live].square().mean()
            scale = (now if self._variance is None else self._variance).sqrt().clamp_min(1e-6)
            past = texts.past / scale
            found = _advantages(f - scale * self._head(texts.hidden, past), texts.live)
            self._variance = now if self._variance is None else 0.9 * self._variance + 0.1 * now
            self._head.follow(texts, decay=0.9)
        with torch.enable_grad():
            for _ in range(num_steps):
                loss = _advantages(f / scale - self._head(texts.hidden, past), texts.live)[texts.live].square().mean()
                self._adam.zero_grad()
                loss.backward()
                self._adam.step()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"head:{key}": value.detach().clone() for key, value in self._head.state_dict().items()}
        for i, moments in self._adam.state_dict()["state"].items():
            state |= {f"adam:{i}.{key}": value.clone() for key, value in moments.items()}
        return state if self._variance is None else state | {"spread:variance": self._variance}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], learning_rate: float) -> _Learner:
        weights = {key.removeprefix("head:"): value for key, value in state.items() if key.startswith("head:")}
        hidden_width, width = weights["earlier"].shape
        head = _Head(hidden_width, len(weights["out_bias"]), width).to(weights["earlier"].device)
        head.load_state_dict(weights)
        learner = cls(head, learning_rate)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("adam:"):
                index, _, name = key.removeprefix("adam:").partition(".")
                moments.setdefault(int(index), {})[name] = value.clone()
        learner._adam.load_state_dict(learner._adam.state_dict() | {"state": moments})
        learner._variance = state.get("spread:variance")
        return learner


def _advantages(f: Tensor, live: Tensor) -> Tensor:
    """f (particle, prompt, text, token) less the mean of the other particles' over their live tokens, 0 of none."""
    if len(f) == 1:
        return f
    total, count = ((x * live).sum((2, 3), keepdim=True) for x in (f, torch.ones_like(f)))
    return f - (total.sum(0) - total) / (count.sum(0) - count).clamp_min(1.0)
