"""Maximum likelihood training of a network on texts, or on the completions of prompts: making a prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayeslm.progress import track

from .completions import completion_ids
from .encoding import Vocabulary
from .gradients import differentiating
from .network import CausalNetwork


class Pair(NamedTuple):
    """Token ids of a prompt, and of a completion with its end."""

    prompt: Sequence[int]
    completion: Sequence[int]


@differentiating()
def fit(
    network: CausalNetwork,
    weights: Sequence[nn.Parameter],
    pairs: Sequence[Pair],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int | None,
    progress: bool,
) -> list[float]:
    r"""Maximise \sum_n \sum_t log p(x_{n,t} | c_n, x_{n,<t}) with AdamW.

    :param weights: the parameters to train, in place. They are frozen afterwards, as all others of the network are
        throughout.
    :param pairs: prompts c_n and completions x_n.
    :param num_steps: steps of AdamW.
    :param batch_size: pairs in a step, drawn without replacement; all of them if there are no more.
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
                chosen = torch.randperm(len(pairs), generator=generator)[:batch_size]
                loss = _loss(network, [pairs[i] for i in chosen.tolist()])
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


def completions_of(
    texts: Sequence[str], tokenizer: Any, start: tuple[int, ...], vocabulary: Vocabulary, max_tokens: int
) -> list[list[int]]:
    """Return the tokens and EOS of texts that complete prompts, cut after ``max_tokens``.

    :param start: the tokens with which the decoder of an encoder-decoder network starts; none of a causal network.
    :raises ValueError: if there are no texts, or one has no token, or tokens that the network has not.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one text to fit")
    rows = []
    for i, text in enumerate(texts):
        row = completion_ids(f"texts[{i}]", text, tokenizer, start)
        _check_tokens(i, row, vocabulary)
        end = next((t for t, token in enumerate(row) if token in vocabulary.eos_token_ids), None)
        row = [*row, *vocabulary.eos_token_ids[:1]] if end is None else row[: end + 1]
        if not row:
            raise ValueError(f"texts[{i}] is empty, and no token ends it")
        rows.append(row[:max_tokens])
    return rows


def _check_tokens(i: int, tokens: Sequence[int], vocabulary: Vocabulary) -> None:
    if tokens and max(tokens) >= vocabulary.size:
        raise ValueError(
            f"texts[{i}] has the token id {max(tokens)}, and the network's are 0..{vocabulary.size - 1}: give it its "
            "own tokenizer"
        )


def to_sequences(
    texts: Sequence[str], tokenizer: Any, bos: int | None, vocabulary: Vocabulary, max_tokens: int
) -> list[Pair]:
    """Return BOS as the prompt, and the tokens and EOS of each text, cut after ``max_tokens`` with BOS.

    A text that begins with BOS, or ends with an EOS, itself gets no second one. Without BOS the first token is the
    prompt.

    :raises ValueError: if there are no texts, or one has no token to predict, or tokens that the network has not.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one text to fit")
    sequences = []
    for i, text in enumerate(texts):
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise ValueError(f"texts[{i}] is empty")
        _check_tokens(i, tokens, vocabulary)
        before = [] if bos is None or tokens[0] == bos else [bos]
        after = [] if tokens[-1] in vocabulary.eos_token_ids else vocabulary.eos_token_ids[:1]
        row = [*before, *tokens, *after][:max_tokens]
        if len(row) < 2:
            raise ValueError(f"texts[{i}] has one token in {max_tokens}, and nothing to predict it from")
        sequences.append(Pair(row[:1], row[1:]))
    return sequences


def _loss(network: CausalNetwork, batch: Sequence[Pair]) -> Tensor:
    """Return nats a token of completions, which are padded on the right: under causal attention that needs no mask."""
    device, longest = network.device, max(len(pair.completion) for pair in batch)
    ids = torch.tensor([[*x, *[0] * (longest - len(x))] for _, x in batch], device=device)
    real = torch.tensor([[t < len(x) for t in range(longest)] for _, x in batch], device=device)
    most = max(len(pair.prompt) for pair in batch)
    prompts = torch.tensor([[*[0] * (most - len(c)), *c] for c, _ in batch], device=device)
    mask = torch.tensor([[int(t >= most - len(c)) for t in range(most)] for c, _ in batch], device=device)
    hidden = network.hidden_after(prompts, None if bool(mask.all()) else mask, ids[:, :-1])
    return -network.token_log_prob(hidden[real], ids[real], temperature=1.0).mean()
