"""Whether a posterior exists: draws of positive probability, and texts of a grammar in the tokens that are allowed."""

from __future__ import annotations

import math

import numpy as np

from bayeslm.models.lm import Autoregressive, Encoded
from bayeslm.models.rewards import Grammar

from .errors import EvidenceError
from .program import Program
from .prompts import prompt_labels


def check_evidence(log_weights: np.ndarray, program: Program) -> None:
    """Check that each prompt has a draw of positive probability.

    :param log_weights: (chain, draw, prompt).
    :raises EvidenceError: if all weights of a prompt are -inf; if the reward is a `Grammar` of which no text can fit
        the tokens, this is said.
    """
    dead = np.atleast_1d(np.isneginf(log_weights).all(axis=(0, 1)))
    if not dead.any():
        return
    i, labels = int(dead.argmax()), prompt_labels(program)
    of = f"for prompt {i} ({labels[i]!r}) " if len(labels) == len(dead) else ""
    limits = {site.fn.max_new_tokens for site in program.completions}
    reward = getattr(program.model, "reward", None)
    if isinstance(reward, Grammar):
        for site in program.completions:
            check_grammar(reward, token_bytes(site.fn), site.fn.max_new_tokens)
    tokens = f", of at most {limits.pop()} tokens (max_new_tokens)" if len(limits) == 1 else ""
    raise EvidenceError(
        f"every reward is -inf {of}in all {log_weights[..., i].size} draws{tokens}: the posterior does not exist, or "
        "the constraint is too rare to be met by chance. Draw more, loosen the constraint or raise max_new_tokens, or "
        "use a better proposal"
    )


def check_grammar(grammar: Grammar, tokens: tuple[bytes, ...] | None, limit: int) -> None:
    """Check that a text of a grammar may fit so many tokens, as far as that is known (`Grammar.least_tokens`).

    :param tokens: of `token_bytes`.
    :param limit: the most tokens of a completion.
    :raises EvidenceError: if none does.
    """
    least = 0 if tokens is None else grammar.least_tokens(tokens, limit)
    if least <= limit:
        return
    if math.isinf(least):
        raise EvidenceError("no text of the grammar can be written in the tokens of this language model")
    raise EvidenceError(
        f"no text of at most {limit} tokens (max_new_tokens) satisfies the grammar: the shortest takes {least:.0f} or "
        "more. Raise max_new_tokens, or loosen the grammar"
    )


def token_bytes(distribution: Autoregressive) -> tuple[bytes, ...] | None:
    """Return the bytes of each token, b"" of those that end a text; None if they depend on a token's neighbours."""
    if not distribution.has_text:
        return None
    known = distribution.lm.token_bytes(Encoded(*distribution.flat_prompts))
    ends = distribution.vocabulary.eos_token_ids
    return None if known is None else tuple(b"" if token in ends else text for token, text in enumerate(known))
