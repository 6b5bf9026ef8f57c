r"""Maximum likelihood training of a network on texts, or on the completions of prompts: making a prior.

    min_\phi  -1/T \sum_n \sum_t log p_\phi(x_{n,t} | c_n, x_{n,<t})

over the T tokens of a minibatch in each step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101). With texts held
out, their loss is computed every so many steps, and the weights of its lowest value are kept.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayeslm.progress import announce, track

from .adapters import own_parameters, without_effect
from .fit_checkpoint import FitCheckpoint, FitState, digest_of_pairs
from .fit_texts import Pair
from .network import CausalNetwork
from .quantised import refuse_quantised
from .scopes import differentiating
from .scoring import scores_at
from .token_model import TokenModel
from .weights import digest_of_values

Schedule = Literal["constant", "linear", "cosine"]
SHARES = {  # of the learning rate, by the share of the steps that is done
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class Losses(list[float]):
    """The loss of each step of a fit, nats a token.

    :param steps: the losses.
    :param held_out: the loss of the texts held out, by the number of steps before it.
    """

    def __init__(self, steps: Sequence[float] = (), held_out: Mapping[int, float] | None = None) -> None:
        super().__init__(steps)
        self.held_out: dict[int, float] = dict(held_out or {})

    @property
    def kept_step(self) -> int:
        """The step whose weights were kept: that of the lowest loss held out, or the last one."""
        return min(self.held_out, key=self.held_out.__getitem__) if self.held_out else len(self)


class FitSettings(NamedTuple):
    """Settings of a fit; see `LanguageModel.fit`."""

    num_steps: int
    batch_size: int
    learning_rate: float
    schedule: Schedule
    seed: int | None
    every: int
    micro_batch_size: int | None

    def identity(self) -> dict[str, Any]:
        """Return those on which a step depends: with a constant rate the number of steps is none of them."""
        left_out = {"every", *(["num_steps"] if self.schedule == "constant" else [])}
        return {name: value for name, value in self._asdict().items() if name not in left_out}


def fit(
    lm: TokenModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: FitSettings,
    *,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> Losses:
    """Minimise the loss over the weights of a language model, in place; of one with adapters over theirs.

    :param pairs: prompts c_n and completions x_n.
    :param held_out: pairs whose loss is computed and not minimised; none of them keeps the last weights.
    :param checkpoint: the folder where the training is kept, and resumed from.
    :param progress: show a progress bar.
    :raises FloatingPointError: if a loss is not finite; the weights are those before that step.
    """
    if not lm.has_adapters:
        refuse_quantised(lm.network, "fit", "fit policy(lora_rank=16)")
    free = {id(p) for p in without_effect(lm.network)}
    start = [p for p in lm.network.parameters() if id(p) not in free]
    with _checkpoint_in(checkpoint, settings, [pairs, held_out], start) as kept:
        return _minimise(lm.current(), own_parameters(lm.network), pairs, held_out, settings, kept, progress)


@differentiating()
def _minimise(
    network: CausalNetwork,
    weights: Sequence[nn.Parameter],
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: FitSettings,
    checkpoint: FitCheckpoint | None,
    progress: bool,
) -> Losses:
    """Minimise the loss; see `fit`.

    :param weights: the parameters to train. They are frozen afterwards, as all others of the network are throughout.
    """
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    generator = torch.Generator()
    generator.manual_seed(settings.seed) if settings.seed is not None else generator.seed()
    losses = Losses()
    best: list[Tensor] | None = None
    frozen = [p for p in network.parameters if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)
        if checkpoint is not None and (saved := checkpoint.read(optimizer)) is not None:
            losses, best = Losses(saved.losses, saved.held_out), saved.best
            generator.set_state(saved.generator)
            announce(f"fit: resumed from step {len(losses)}", progress)
        with track("fit", settings.num_steps, progress, done=len(losses)) as report:
            while True:
                step = len(losses)
                due = step % settings.every == 0 or step == settings.num_steps
                if held_out and due and step not in losses.held_out:
                    losses.held_out[step] = evaluate(network, held_out, settings)
                    if losses.kept_step == step:
                        best = [p.detach().clone() for p in weights]
                if checkpoint is not None and due and step > 0:
                    checkpoint.write(FitState(losses, losses.held_out, generator.get_state(), best), optimizer)
                if step >= settings.num_steps:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * SHARES[settings.schedule](step / settings.num_steps)
                chosen = torch.randperm(len(pairs), generator=generator)[: settings.batch_size]
                optimizer.zero_grad()
                loss = _accumulate(network, [pairs[i] for i in chosen.tolist()], settings)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"fit: the loss of step {step + 1} is {loss}: lower the learning rate")
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                losses.append(loss)
                figures = {"loss": loss} | ({"held out": list(losses.held_out.values())[-1]} if held_out else {})
                report(values=figures)
    finally:
        for p in weights:
            p.requires_grad_(False)
        optimizer.zero_grad()
    if best is not None:
        with torch.no_grad():
            for p, x in zip(weights, best, strict=True):
                p.copy_(x)
    return losses


@contextlib.contextmanager
def _checkpoint_in(
    folder: str | os.PathLike[str] | None,
    settings: FitSettings,
    pairs: Sequence[Sequence[Pair]],
    parameters: Sequence[Tensor],
) -> Iterator[FitCheckpoint | None]:
    """Yield the checkpoint of a fit in a folder, or None without one.

    :param pairs: to learn and to hold out.
    :param parameters: of the network, as they are before the fit, on which it depends.
    """
    if folder is None:
        yield None
        return
    texts, held_out = (digest_of_pairs(some) for some in pairs)
    start = digest_of_values((str(i), x) for i, x in enumerate(parameters))
    digests = {"texts": texts, "texts held out": held_out, "weights at the start": start}
    with FitCheckpoint.opened(folder, settings.identity() | digests) as checkpoint:
        yield checkpoint


@torch.no_grad()
def evaluate(network: CausalNetwork, pairs: Sequence[Pair], settings: FitSettings) -> float:
    """Return the loss of pairs, nats a token."""
    losses = [_loss(network, part).item() * _tokens(part) for part in _micro_batches(network, pairs, settings)]
    return sum(losses) / _tokens(pairs)


def _accumulate(network: CausalNetwork, batch: Sequence[Pair], settings: FitSettings) -> float:
    """Add the gradient of a minibatch's loss to those of the weights, and return the loss."""
    total = 0.0
    for part in _micro_batches(network, batch, settings):
        loss = _loss(network, part) * (_tokens(part) / _tokens(batch))
        loss.backward()
        total += loss.item()
    return total


def _micro_batches(network: CausalNetwork, batch: Sequence[Pair], settings: FitSettings) -> Iterator[Sequence[Pair]]:
    """Give the parts of a batch that a pass takes; see `memory`."""
    longest = (max(len(pair[i]) for pair in batch) for i in (0, 1))
    size = settings.micro_batch_size or network.batches(*longest).gradient(False)
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


def _tokens(pairs: Sequence[Pair]) -> int:
    return sum(len(pair.completion) for pair in pairs)


def _loss(network: CausalNetwork, batch: Sequence[Pair]) -> Tensor:
    """Return nats a token of completions, which are padded on the right: under causal attention that needs no mask."""
    device, longest = network.device, max(len(pair.completion) for pair in batch)
    ids = torch.tensor([[*x, *[0] * (longest - len(x))] for _, x in batch], device=device)
    real = torch.tensor([[t < len(x) for t in range(longest)] for _, x in batch], device=device)
    most = max(len(pair.prompt) for pair in batch)
    prompts = torch.tensor([[*[0] * (most - len(c)), *c] for c, _ in batch], device=device)
    mask = torch.tensor([[int(t >= most - len(c)) for t in range(most)] for c, _ in batch], device=device)
    hidden = network.hidden_after(prompts, None if bool(mask.all()) else mask, ids[:, :-1])
    return -scores_at(network, hidden[real], ids[real]).mean()
