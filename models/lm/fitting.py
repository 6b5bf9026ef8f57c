"""Maximum likelihood training of a language model on texts: making a prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslm.progress import track

from . import loading

if TYPE_CHECKING:
    from .language_model import LanguageModel


def fit(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    num_steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    max_tokens: int = 128,
    seed: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Maximise sum_n log p(text_n EOS | BOS) over the network's weights with AdamW; the model is frozen again after.

    Of a network with adapters the adapters are trained, since the weights under them may be another model's.

    :param lm: trained in place. Without a BOS token, each text's own first token stands in the prompt.
    :param batch_size: texts a step, drawn without replacement; all of them at each step where there are no more.
    :param max_tokens: longer texts are cut there, and then not taught to end.
    :returns: the loss of each step: nats a token.
    :raises ValueError: if there are no texts, or one has nothing to predict.
    """
    if lm.tokenizer is None:
        raise TypeError("fit needs a tokenizer")
    if batch_size < 1 or num_steps < 1:
        raise ValueError(f"num_steps and batch_size must be at least 1, got {num_steps} and {batch_size}")
    if not texts:
        raise ValueError("texts is empty: give at least one text to fit")
    sequences = [_sequence(lm, i, text, max_tokens) for i, text in enumerate(texts)]
    weights = loading.own_parameters(lm.network)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    losses: list[float] = []
    lm.network.requires_grad_(False)
    try:
        for p in weights:
            p.requires_grad_(True)
        with track("fit", num_steps, progress) as report:
            for _ in range(num_steps):
                chosen = torch.randperm(len(sequences), generator=generator)[:batch_size]
                loss = _loss(lm, [sequences[i] for i in chosen.tolist()])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                losses.append(loss.item())
                report(values={"loss": losses[-1]})
    finally:
        lm.network.requires_grad_(False)
        optimizer.zero_grad()
    return losses


def _sequence(lm: LanguageModel, i: int, text: str, max_tokens: int) -> list[int]:
    """BOS, the text's tokens, EOS."""
    tokens = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ValueError(f"texts[{i}] is empty")
    if lm.bos_token_id is not None:
        tokens = [lm.bos_token_id, *tokens]
    tokens = (tokens + list(lm.eos_token_ids[:1]))[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"texts[{i}] has one token in {max_tokens}, and nothing to predict it from")
    return tokens


def _loss(lm: LanguageModel, batch: list[list[int]]) -> Tensor:
    """Nats a token of right-padded sequences (right padding needs no mask under causal attention)."""
    longest = max(map(len, batch))
    ids = torch.tensor([row + [lm.pad_token_id] * (longest - len(row)) for row in batch], device=lm.device)
    lengths = torch.tensor([len(row) for row in batch], device=lm.device)
    positions = torch.arange(longest, device=lm.device).expand(len(batch), -1)
    real = positions[:, 1:] < lengths[:, None]
    hidden, _ = lm.causal.hidden(ids[:, :-1], None, positions[:, :-1])
    return -lm.causal.token_log_prob(hidden[real], ids[:, 1:][real], temperature=1.0).mean()
