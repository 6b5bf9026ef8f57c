"""Maximum likelihood training of a causal network on texts: making a prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslm.progress import track

from .encoding import Vocabulary
from .gradients import differentiating
from .network import CausalNetwork


@differentiating()
def fit(
    network: CausalNetwork,
    weights: Sequence[nn.Parameter],
    sequences: Sequence[Sequence[int]],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int | None,
    progress: bool,
) -> list[float]:
    r"""Maximise \sum_n \sum_{t > 1} log p(x_{n,t} | x_{n,<t}) with AdamW.

    :param weights: the parameters to train, in place. They are frozen afterwards, as all others of the network are
        throughout.
    :param sequences: token ids of texts, of at least two tokens each.
    :param num_steps: steps of AdamW.
    :param batch_size: sequences in a step, drawn without replacement; all of them if there are no more.
    :param learning_rate: of AdamW.
    :param seed: of the batches; None: one that the system chooses.
    :param progress: show a progress bar.
    :returns: the loss of each step, nats a token.
    """
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    losses: list[float] = []
    frozen = [p for p in network.parameters if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)
        with track("fit", num_steps, progress) as report:
            for _ in range(num_steps):
                chosen = torch.randperm(len(sequences), generator=generator)[:batch_size]
                loss = _loss(network, [sequences[i] for i in chosen.tolist()])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                losses.append(loss.item())
                report(values={"loss": losses[-1]})
    finally:
        for p in weights:
            p.requires_grad_(False)
        optimizer.zero_grad()
    return losses


def to_sequences(
    texts: Sequence[str], tokenizer: Any, bos: int | None, vocabulary: Vocabulary, max_tokens: int
) -> list[list[int]]:
    """Return BOS, the tokens, and EOS of each text, cut after ``max_tokens``.

    A text that begins with BOS, or ends with an EOS, itself gets no second one.

    :raises ValueError: if there are no texts, or one has no token to predict, or tokens that the network has not.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one text to fit")
    sequences = []
    for i, text in enumerate(texts):
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise ValueError(f"texts[{i}] is empty")
        if max(tokens) >= vocabulary.size:
            raise ValueError(
                f"texts[{i}] has the token id {max(tokens)}, and the network's are 0..{vocabulary.size - 1}: give it "
                "its own tokenizer"
            )
        before = [] if bos is None or tokens[0] == bos else [bos]
        after = [] if tokens[-1] in vocabulary.eos_token_ids else vocabulary.eos_token_ids[:1]
        row = [*before, *tokens, *after][:max_tokens]
        if len(row) < 2:
            raise ValueError(f"texts[{i}] has one token in {max_tokens}, and nothing to predict it from")
        sequences.append(row)
    return sequences


def _loss(network: CausalNetwork, batch: list[Sequence[int]]) -> Tensor:
    """Return nats a token of right-padded sequences (right padding needs no mask under causal attention)."""
    device, longest = network.device, max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)
    lengths = torch.tensor([len(row) for row in batch], device=device)
    positions = torch.arange(longest, device=device).expand(len(batch), -1)
    real = positions[:, 1:] < lengths[:, None]
    hidden = network.hidden_of_texts(ids[:, :-1], None)
    return -network.token_log_prob(hidden[real], ids[:, 1:][real], temperature=1.0).mean()
