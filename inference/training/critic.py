r"""A critic: a baseline for every token, learned on the hidden states of the prior, for the gradient of the ELBO.

With f = log p(x) + l(x) - log q(x) of a complete text, the score-function gradient token by token is

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

A trajectory is a sequence like a completion: its tokens are actions, and the hidden state before an action is the
observation, the time and the return so far. U_t is then that return over beta plus a state's soft value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu

from bayeslm.inference.program import ranks
from bayeslm.validation import Count, Positive, validated

from .baselines import ExponentialAverage, Texts, less_others
from .resumable import ANY, check_tensor
from .state import EMPTY, State, under, within
from .sums import summed

AVERAGE = ExponentialAverage()  # the level, where there is no other particle


@validated
@dataclass(frozen=True)
class Critic:
    """`ReverseKL`'s baseline of completions. Other latents have leave-one-out, or an average if there is one particle.

    Each completion site has a head of its own, which is remembered in the run's state.

    :param learning_rate: of the critic's Adam.
    :param num_steps: steps of Adam on the texts of each training step, after their advantages are computed.
    :param width: of the head's one hidden layer.
    :raises ValueError: if a setting is not positive.
    """

    learning_rate: Positive = 3e-3
    num_steps: Count = 1
    width: Count = 32

    def __call__(
        self, name: str, f: Tensor, prompts: Tensor | None = None, state: State = EMPTY
    ) -> tuple[Tensor, State]:
        """Return the advantage (particle, prompt) of a latent that is no completion, and the next state."""
        total, num = ranks().summed(f)
        return (less_others(f, f, total, num), state) if num > 1 else AVERAGE(name, f, prompts, state)

    def of_tokens(self, name: str, f: Tensor, texts: Texts, state: State = EMPTY) -> tuple[Tensor, State]:
        """Return the advantages (particle, prompt, text, token) by what was learned before; then learn.

        :param f: (particle, prompt), or (particle, 1).
        """
        num, live = map(int, ranks().total(torch.stack([torch.tensor(len(f)), texts.live.sum().cpu()])))
        if not live:
            return torch.zeros_like(texts.past), state  # no token: there is nothing to credit, nor to learn
        level, averages = (f, EMPTY) if num > 1 else AVERAGE(name, f, texts.prompts, state)
        head = within("head", state) or _new_head(texts, live, self.width)
        level = level[:, :, None, None]
        with torch.no_grad():
            now = ranks().total(_square(level.expand(texts.past.shape), texts.live)) / live
            variance = state.get("variance", now)
            scale = variance.sqrt().clamp_min(1e-6)
            past = texts.past / scale
            found = _advantages(level - scale * value_of(head, texts.hidden, past), texts.live)
            variance = 0.9 * variance + 0.1 * now if "variance" in state else now
            head = _rescaled(head, texts, live, decay=0.9)
        learned = {key: head[key].clone().requires_grad_() for key in sorted(head.keys() - set(BUFFERS))}
        adam = torch.optim.Adam(learned.values(), self.learning_rate)
        _load_moments(adam, within("adam", state))
        with torch.enable_grad():
            for _ in range(self.num_steps):
                error = level / scale - value_of(head | learned, texts.hidden, past)
                loss = _square(error, texts.live) / live
                adam.zero_grad()
                loss.backward()
                ranks().add_up([p.grad for p in learned.values() if p.grad is not None])
                adam.step()
        moments = adam.state_dict()["state"]
        return found, {
            **averages,
            **under("head", head | {key: value.detach() for key, value in learned.items()}),
            **{f"adam.{i}.{key}": value for i, each in moments.items() for key, value in each.items()},
            "variance": variance,
        }

    def check_state(self, state: State) -> None:
        """Check a state that is read from a checkpoint, of one site.

        :raises ValueError: if this critic cannot have had it; with an entry's name.
        """
        if state.keys() <= {"average"}:
            return
        head = within("head", state)
        tokens, hidden = (len(head[name]) if name in head else ANY for name in ("out_bias", "mean"))
        for name, shape in _shapes(tokens, hidden, self.width).items():
            check_tensor(f"head.{name}", head.get(name), shape)
        check_tensor("variance", state.get("variance"), ())
        for i, name in enumerate(sorted(head.keys() - set(BUFFERS))):
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                shape = () if moment == "step" else head[name].shape
                check_tensor(f"adam.{i}.{moment}", state.get(f"adam.{i}.{moment}"), shape)


def _shapes(tokens: int, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a head's tensors."""
    return {
        "mean": (hidden,),
        "deviation": (hidden,),
        "earlier": (hidden, width),
        "inner": (hidden + width + 1, width),
        "inner_bias": (tokens, width),
        "out": (width,),
        "out_bias": (tokens,),
        "belief": (tokens,),  # in the past
    }


BUFFERS = ("mean", "deviation")  # of the hidden states; all else in a head is learned


def _new_head(texts: Texts, live: int, width: int) -> dict[str, Tensor]:
    """Return a head whose value is 0, for texts such as these, by whose hidden states it scales."""
    tokens, hidden_width = texts.hidden.shape[-2:]
    # The same every time: a training that resumes must not draw other random numbers.
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[0] ** 0.5

    head = {name: torch.zeros(shape) for name, shape in _shapes(tokens, hidden_width, width).items()}
    head |= {"deviation": torch.ones(hidden_width)} | {name: normal(*head[name].shape) for name in ("earlier", "inner")}
    return _rescaled({name: value.to(texts.hidden.device) for name, value in head.items()}, texts, live, decay=0.0)


@torch.no_grad()
def _rescaled(head: dict[str, Tensor], texts: Texts, live: int, decay: float) -> dict[str, Tensor]:
    """Scale by averages of earlier steps: the states of a policy that learns to live longer move far.

    :param live: tokens of the texts of all processes.
    """
    rows = texts.hidden[texts.live].float()
    mean = ranks().total(rows.sum(0)) / live
    variance = ranks().total((rows - mean).square().sum(0)) / live
    of_all = (variance + (mean - mean.mean()).square()).mean().sqrt()
    now = {"mean": mean, "deviation": variance.sqrt().clamp_min(1e-3 * float(of_all) + 1e-12)}
    return head | {name: head[name].lerp(now[name], 1.0 - decay) for name in BUFFERS}


def value_of(head: dict[str, Tensor], hidden: Tensor, past: Tensor) -> Tensor:
    """Return U_t (..., token) in units of f's spread, of hidden (..., token, width) and past (..., token).

    It depends on the hidden state before x_t, the sum over earlier ones (which a last state has long forgotten), t, and
    the past.
    """
    hidden = (hidden.float() - head["mean"]) / head["deviation"]
    earlier = gelu(hidden @ head["earlier"]).cumsum(-2) / len(head["out_bias"]) ** 0.5
    inner = torch.cat([hidden, earlier, past[..., None]], -1) @ head["inner"] + head["inner_bias"]
    return gelu(inner) @ head["out"] + head["belief"] * past + head["out_bias"]


def _load_moments(adam: torch.optim.Adam, saved: dict[str, Tensor]) -> None:
    """Load what Adam's ``state_dict`` had after the step before, in copies, since Adam changes it in place."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value.clone()
    adam.load_state_dict(adam.state_dict() | {"state": moments})


def _square(f: Tensor, live: Tensor) -> Tensor:
    """Return the sum of the squared advantages of this process's live tokens."""
    return _advantages(f, live)[live].square().sum()


def _advantages(f: Tensor, live: Tensor) -> Tensor:
    """f (particle, prompt, text, token) less the mean of the other particles' over their live tokens, 0 of none.

    The other particles are those of all processes.
    """
    sums = torch.stack([(x * live).sum((2, 3), keepdim=True) for x in (f, torch.ones_like(f))])
    total, count = summed(sums.sum(1, keepdim=True)) - sums
    return f - total / count.clamp_min(1.0)
