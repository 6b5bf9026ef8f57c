"""Completions that keep to a constraint as a proposal: for engines that draw them whole (`ImportanceSampling`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

from bayeslm.inference.program import Program, ProgramError, draw_latents
from bayeslm.models.lm import Autoregressive, Decoder, exclusive, log_softmax_at
from bayeslm.models.rewards import Grammar
from bayeslm.posterior import Posterior
from bayeslm.progress import wrote
from bayeslm.validation import validated

from .constraints import MaskedTokens, TokenConstraint, TokensOf, allowed_tokens

CHECKED = 200  # texts of a run, those that were cut off first


class ConstrainedCompletions(TorchDistribution):
    """Completions drawn token by token from those that a constraint allows: a proposal.

    log q of a completion that `CheckedTokens` have drawn is an estimate, of which only E[p / q] is right, and is known
    for the last sample alone.

    :param base: the distribution of the completions without the constraint.
    :param tokens: returns the next tokens of completions of prompts (row,) that a decoder writes.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Autoregressive, tokens: TokensOf) -> None:
        self._base = base
        self._tokens = tokens
        self._drawn: list[tuple[Tensor, Tensor]] = []  # the last sample and its log q
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConstrainedCompletions:
        new = ConstrainedCompletions(self._base.expand(batch_shape), self._tokens)
        new._drawn = self._drawn
        return new

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        value, log_q = self._written(self._base.prompt_rows(shape))
        value = value.reshape(shape + self.event_shape)
        self._drawn[:] = [(value, log_q.reshape(shape))]
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        for drawn, log_q in self._drawn:
            if drawn is value:
                return log_q
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        given = value.expand(shape + self.event_shape).reshape(-1, self.event_shape[0])
        return self._written(self._base.prompt_rows(shape), given)[1].reshape(shape)

    @torch.no_grad()
    def _written(self, prompts: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write completions of prompts (row,), and return them and their log q.

        :param given: the completions (row, token), if they are not to be drawn.
        """
        values = torch.empty((len(prompts), *self.event_shape), dtype=torch.long, device=prompts.device)
        log_q = torch.empty(len(prompts), device=prompts.device)
        with exclusive(), self._base.prompted.drawing(len(prompts)) as prompted:
            for part, prefix in prompted.prefixes(prompts, prompted.max_rows):
                decoder = Decoder(prompted, prefix)
                allowed = self._tokens(self._base, prompts[part], decoder)
                if given is not None and not isinstance(allowed, MaskedTokens):
                    raise ProgramError(
                        "the probability that a constraint without masks proposes a text is not known: use SMC with "
                        "the constraint as its twist"
                    )
                every = torch.arange(len(part), device=part.device)
                while not decoder.done:
                    chosen = None if given is None else (every, self._in_range(given[part, decoder.t]))
                    token, score = allowed.draw(chosen)
                    log_p = log_softmax_at(decoder.logits, token)
                    # where no token is allowed the prior proposes, and the program's own term of the constraint is -inf
                    decoder.append(token, torch.where(score == torch.inf, log_p, score))
                    wrote(len(part))
                values[part], log_q[part] = decoder.values, decoder.scores.sum(-1)
        return values, log_q

    def _in_range(self, tokens: Tensor) -> Tensor:
        return tokens.clamp(0, self._base.vocabulary.size - 1)  # of ended texts, whose pad need not be a token


@validated
def constraint_of(
    setting: TokenConstraint | Mapping[str, TokenConstraint], program: Program
) -> dict[str, TokenConstraint]:
    """Return the constraint of each completion that has one, by site.

    :raises ProgramError: if it is not said which of several completions it is for, or one is no completion.
    """
    names = [site.name for site in program.completions]
    if isinstance(setting, Mapping):
        if unknown := set(setting) - set(names):
            raise ProgramError(f"a constraint is for site {min(unknown)!r}, which is no completion of the program")
        return dict(setting)
    if len(names) != 1:
        raise ProgramError(
            f"the program has the completions {', '.join(names) or 'none'}: say which one a constraint is for, "
            "{site: constraint}"
        )
    return {names[0]: setting}


@validated
def with_factor(posterior: Posterior, setting: Any) -> Posterior:
    """Return a posterior whose proposal had grammars, after a check that these are factors of its program.

    Texts that a grammar refuses must have no weight. Without the factor those have that the limit has cut off.

    :param setting: an engine's constraint, or a mapping of what some sites have; what is no grammar does not count.
    :raises ProgramError: if a text that is refused has weight, with the text.
    """
    grammars = setting if isinstance(setting, Mapping) else dict.fromkeys(posterior.texts, setting)
    for name, grammar in grammars.items():
        if not isinstance(grammar, Grammar) or name not in posterior.texts:
            continue
        texts, cut = posterior.texts[name], posterior.truncated[name]  # (chain, draw, *batch)
        alive = posterior.log_weights > -np.inf
        if alive.shape != texts.shape:
            alive = np.broadcast_to(alive.all(2).reshape(*alive.shape[:2], *[1] * (texts.ndim - 2)), texts.shape)
        different = list(dict.fromkeys([*texts[alive & cut], *texts[alive & ~cut]]))[:CHECKED]
        for text, score in zip(different, grammar.score([], different), strict=True):
            if score is not None and score < 0:
                raise ProgramError(
                    f"the grammar is a proposal for {name!r} and no factor of the program: {text!r:.80} has weight, "
                    "which the grammar refuses. Add the grammar to the program's reward too"
                )
    return posterior


@validated
class ConstraintGuide:
    """A guide that proposes completions by their constraints, and other latents from the prior.

    :param program: the inspected program.
    :param setting: the constraint, or one for each of some sites.
    :raises ProgramError: see `constraint_of`.
    """

    is_of_program = True  # see `check_guide`

    def __init__(self, program: Program, setting: TokenConstraint | Mapping[str, TokenConstraint]) -> None:
        self._program = program
        self._distributions = {
            name: partial(ConstrainedCompletions, tokens=self._tokens(name, constraint))
            for name, constraint in constraint_of(setting, program).items()
        }

    def _tokens(self, name: str, constraint: TokenConstraint) -> TokensOf:
        """Return what proposes the next tokens of a site."""
        return partial(allowed_tokens, constraint)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        draw_latents(self._program, self._distributions, {}, args, kwargs)
