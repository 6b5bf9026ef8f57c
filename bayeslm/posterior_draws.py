"""Draws of a posterior, their weights, and statistics of the run, as NumPy arrays: what is known, and resampling.

All that judges a posterior (`bayeslm.diagnostics`, `bayeslm.reliability`, `bayeslm.report`, ...) stands on this, and
`bayeslm.Posterior`, which offers the same as methods, on top of all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from bayeslm.posterior_checks import check_fields
from bayeslm.weights import Array, normalise, num_draws, smoothed_where_reliable

from .validation import Count, Seed, validated

RESAMPLED = {"enumerated": "exact", "weighted": "uncorrected", "particles": "uncorrected"}  # kind before and after
LABEL_WIDTH = 60  # the longest label of a prompt in tables and coordinates
ENUMERATED_DRAWS = 1000  # the default number of draws from an enumeration


class DiagnosticsWarning(UserWarning):
    """Draws, weights or chains are too few, too uneven or too dependent for the errors that are stated.

    ``warnings.simplefilter("ignore", DiagnosticsWarning)`` silences them, "error" makes them exceptions.
    """


@dataclass(eq=False, repr=False)
class PosteriorDraws:
    """Draws of a posterior over the latents of a model, in these shapes for every engine.

    If every latent is inside the plate of prompts, each prompt has a posterior and weights of its own. If prompts share
    a latent, they have one joint posterior: the prompt axis of `log_weights`, `log_joint` and `log_evidence` then has
    length 1, and resampling picks a draw of all prompts together.

    :raises ValueError: on construction, if shapes, names or values contradict each other.
    """

    samples: dict[str, Array]
    """(chain, draw, *batch, *event): latent sites, completions as token ids, deterministic sites."""
    log_weights: Array
    """(chain, draw, prompt): log joint − log q, unnormalised; 0 for equally weighted draws; −inf allowed. For an
    enumeration log joint + log(number of values), so that log mean exp is log Z; for particles scaled so that the mean
    weight of each chain is unbiased for Z."""
    log_joint: Array
    """(chain, draw, prompt): log p(x, reward)."""
    log_likelihood: dict[str, Array]
    """(chain, draw, prompt) for each factor and observed site, in nats: r/β of a factor."""
    log_evidence: Array
    """(prompt,): the estimate of log Z; NaN where the engine gives none."""
    log_evidence_stderr: Array
    """(prompt,): its standard error."""
    kind: str
    """"enumerated" (every value once, with exact weights), "exact" (independent draws of the posterior), "weighted"
    (independent draws of q, with weights), "particles" (weighted draws of a particle system, dependent within a chain),
    "markov" (Markov chains that converge to the posterior), "uncorrected" (draws of an unknown distribution, such as
    best-of-n)."""
    engine: str
    """The engine's name."""
    dims: dict[str, tuple[str, ...]]
    """Names of the axes of samples[name] after (chain, draw): ("prompt", "token") for a completion; and of the axes of
    an observed site whose single observations are kept (`pointwise`, `predictive`)."""
    prompts: list[str]
    """The text of each prompt."""
    rewards: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, prompt): r in its own units, by the name of its factor, where the program has recorded it (by
    `bayeslm.models.rewards.factor`, as ready programs do); of ``pyro.factor(name, r / beta)`` r is not known."""
    prompt_names: list[str] = field(default_factory=list)
    """The last user's turn of each prompt, if prompts are chats, whose texts begin with what all of them share."""
    texts: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch) of str, for each completion site."""
    lengths: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch): the number of tokens of each completion before padding."""
    truncated: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch) of bool: which completions were cut at the limit, without an end."""
    token_log_ratio: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch, token): log q − log p of each token of a completion that a policy or guide drew."""
    token_ends: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch, token): where these tokens end in the text, as a number of characters."""
    pointwise: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *dims): the log-likelihood of every observation of a site in plates other than the prompts';
    `log_likelihood` holds their sum."""
    predictive: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *dims): replicated values of observed sites, one data set for each draw; see
    `bayeslm.inference.predict`."""
    sample_stats: dict[str, Array] = field(default_factory=dict)
    """(chain, draw) or (chain, draw, prompt): what the sampler saw at each draw, by ArviZ's names: "diverging",
    "tree_depth" and "energy" of `NUTS`."""
    prior: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, *batch, *event): draws of the prior: latents, deterministic sites, factors, "<site>_length"."""
    prior_rewards: dict[str, Array] = field(default_factory=dict)
    """(chain, draw, prompt): `rewards` of the draws of the prior."""
    observed: dict[str, Array] = field(default_factory=dict)
    """The values of the observed sites."""
    stats: dict[str, Any] = field(default_factory=dict)
    """Statistics of the run: seconds, tokens, model_calls, ELBO of each step, acceptance, ..."""
    policy: Any = None
    """The trained language model, or None; `save` calls its `save_pretrained`."""
    log_evidence_lower: Array | None = None
    """(prompt,): a stochastic lower bound on log Z, where the engine has one: the mean of log Ẑ over chains."""
    log_evidence_upper: Array | None = None
    """(prompt,): a stochastic upper bound on log Z, where the engine has one: that mean in a conditional run."""
    log_evidence_high: Array | None = None
    """(prompt,): an upper limit of log Z (95%) that counts what was not seen, where draws of the prior and a bound of
    the reward give one; see `bayeslm.bounds.unseen_limit`."""
    roots: Array | None = None
    """(chain, draw, prompt) int, for particles: the index, in its chain, of the first particle each descends from."""
    conditional: bool = False
    """Whether draw 0 of each chain is an exact draw of the posterior that the engine retained: log Ẑ of a chain is then
    an upper bound on log Z in expectation, else a lower bound."""
    policy_path: Path | None = None
    """The folder of a loaded posterior's policy, for `LanguageModel.from_pretrained(posterior.policy_path)`."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def prompt_labels(self) -> list[str]:
        """A short label for each prompt: the user's last turn of a chat, else its text; numbered if two are equal."""
        lines = [" ".join(prompt.split()) for prompt in self.prompt_names or self.prompts]
        labels = [line if len(line) <= LABEL_WIDTH else line[: LABEL_WIDTH - 1] + "…" for line in lines]
        if len(set(labels)) == len(labels):
            return labels
        return [f"[{i}] {label}" for i, label in enumerate(labels)]

    @property
    def measure(self) -> str:
        """What draws are compared by: "reward" if the program has recorded one, else "log-likelihood".

        Several rewards have no common unit: their draws are compared by the log-likelihood, the sum of all r/β.
        """
        return "reward" if len(self.rewards) == 1 else "log-likelihood"

    @property
    def measured(self) -> Array:
        """(chain, draw, prompt): the reward, or the log-likelihood, as `measure` says."""
        return self._sum(self._terms)

    @property
    def prior_measured(self) -> Array | None:
        """`measured` of the draws of the prior; None if the engine kept none."""
        if self.measure == "reward":
            return self._sum(self.prior_rewards) if self.prior_rewards.keys() == self.rewards.keys() else None
        if not self.log_likelihood or not self.prior.keys() >= self.log_likelihood.keys():
            return None
        return self._sum({name: self.prior[name] for name in self.log_likelihood})

    @validated
    def total_log_likelihood(self, terms: dict[str, Array] | None = None) -> Array:
        """Return the sum of all factors and observed sites; over prompts too, if they share a latent.

        :param terms: of other draws, by site; None for those of the posterior's draws.
        """
        chains, draws, columns = self.log_weights.shape
        if terms is not None and (missing := self.log_likelihood.keys() - terms):
            raise ValueError(f"terms must have all sites of log_likelihood, and lack {min(missing)!r}")
        total: Array = np.zeros((chains, draws, columns)) if terms is None else np.zeros((1, 1, columns))
        for name, term in self.log_likelihood.items():
            values = term if terms is None else terms[name]
            total = total + (values.sum(axis=2, keepdims=True) if columns == 1 else values)
        return total

    @property
    def _terms(self) -> dict[str, Array]:
        return self.rewards if self.measure == "reward" else self.log_likelihood

    def _sum(self, terms: dict[str, Array], prompts: slice = slice(None)) -> Array:
        """Return the sum of terms (chain, draw, prompt); one of all prompts together is added to each prompt's."""
        leading = next(iter(terms.values()), self.log_weights).shape[:2]
        start = np.zeros((*leading, len(range(len(self.prompts))[prompts])))
        return sum((x if x.shape[2] == 1 else x[..., prompts] for x in terms.values()), start=start)

    def weights(self) -> Array:
        """Return weights (chain, draw, prompt) that sum to 1 over chains and draws for each prompt, for resampling.

        Weighted draws have Pareto-smoothed weights where k̂ < 0.7, and else their own, an enumeration has exact ones,
        kinds of equal weight equal ones. Particles keep their raw weights: resampling has tempered them, and fitting a
        tail needs independent draws. Estimates with errors (`bayeslm.diagnostics`) are by the raw weights of all kinds:
        smoothing makes weights more even, but log Z and E[r] less likely to be within two errors of the truth.

        :raises ValueError: if every weight of a prompt is zero.
        """
        if self.kind == "weighted":
            return np.exp(smoothed_where_reliable(self.log_weights))
        if self.kind in ("enumerated", "particles"):
            return np.exp(normalise(self.log_weights))
        return np.full(self.log_weights.shape, 1.0 / num_draws(self.log_weights))

    @validated
    def resample(self, num_draws: Count | None = None, seed: Seed = 0) -> Self:
        """Return equally weighted draws, by systematic resampling by `weights()` over chains and draws jointly.

        Each prompt is resampled on its own, unless prompts share a latent. The order of the draws is kept: copies of a
        draw stay adjacent and, as far as the weights allow, in their chain, so that R̂ and the ESS of the result reflect
        unequal weights (draws of an enumeration, which has no order, are shuffled).
        Source: Carpenter, Clifford, Fearnhead 1999, Improved particle filter for nonlinear problems.

        :param num_draws: per chain. Default: as many as there are, which leaves equally weighted draws unchanged, and
            1000 for an enumeration.
        :param seed: of the resampling.
        :returns: a posterior of kind "exact" for an enumeration, "uncorrected" for weighted draws and particles, and of
            the same kind otherwise.
        :raises ValueError: if every weight of a prompt is zero, or num_draws < 1.
        """
        picked = self._resampled(num_draws, seed)
        return replace(picked, log_weights=np.zeros_like(picked.log_weights))

    @validated
    def best(self, prompt: int = 0, k: int = 5, site: str | None = None) -> list[tuple[str, float]]:
        """Return the k distinct texts of highest reward among a prompt's raw draws, and their rewards, best first.

        Where no reward is recorded, or several are, the log-likelihood takes its place (`measure`).

        :param site: the completion site, where the model has several.
        :raises ValueError: if ``site`` is needed and missing, or unknown.
        :raises IndexError: if there is no such prompt.
        """
        if not -len(self.prompts) <= prompt < len(self.prompts):
            raise IndexError(f"prompt must be below {len(self.prompts)}, the number of prompts, got {prompt}")
        site = self.completion_site(site)
        texts, dims = self.texts[site], self.dims[site][:-1]
        if "prompt" in dims:
            texts = np.take(texts, prompt, axis=2 + dims.index("prompt"))
        index = range(len(self.prompts))[prompt]
        rewards = self._sum(self._terms, slice(index, index + 1))
        rewards = rewards.reshape(*texts.shape[:2], *(1,) * (texts.ndim - 2))
        highest: dict[str, float] = {}
        for text, reward in zip(texts.flat, np.broadcast_to(rewards, texts.shape).flat, strict=True):
            highest[text] = max(float(reward), highest.get(text, -np.inf))
        return sorted(highest.items(), key=lambda item: -item[1])[:k]

    @validated
    def completion_site(self, site: str | None = None) -> str:
        """Return the name of a completion site, the only one where none is given.

        :raises ValueError: if there is no such site, or there are several and none is given.
        """
        if site is None and len(self.texts) == 1:
            (site,) = self.texts
        if site is None or site not in self.texts:
            raise ValueError(f"site must be one of {sorted(self.texts)}, not {site!r}: give site=...")
        return site

    def _resampled(self, num_draws: int | None, seed: int) -> Self:
        """Resample as `resample` does, but let each draw keep its log weight."""
        if num_draws is None and self.kind not in RESAMPLED:
            return self
        chains, own, columns = self.log_weights.shape
        draws = num_draws or (ENUMERATED_DRAWS if self.kind == "enumerated" else own)
        rng = np.random.default_rng(seed)
        cumulative = np.cumsum(self.weights().reshape(-1, columns), axis=0)
        points = (np.arange(chains * draws)[:, None] + rng.random(columns)) / (chains * draws)
        index = np.empty((chains * draws, columns), dtype=np.intp)
        for column in range(columns):
            bounds = cumulative[:, column] / cumulative[-1, column]
            index[:, column] = np.searchsorted(bounds, points[:, column], side="right")
        if self.kind == "enumerated":
            index = rng.permuted(index, axis=0)
        index = index.reshape(chains, draws, columns)

        def take(values: Array, dims: tuple[str, ...]) -> Array:
            return _take(values, dims, index)

        dims = self.dims
        return replace(
            self,
            kind=RESAMPLED.get(self.kind, self.kind),
            roots=None,
            samples={name: take(x, dims.get(name, ())) for name, x in self.samples.items()},
            texts={name: take(x, dims[name][:-1]) for name, x in self.texts.items()},
            lengths={name: take(x, dims[name][:-1]) for name, x in self.lengths.items()},
            truncated={name: take(x, dims[name][:-1]) for name, x in self.truncated.items()},
            token_log_ratio={name: take(x, dims[name]) for name, x in self.token_log_ratio.items()},
            token_ends={name: take(x, dims[name]) for name, x in self.token_ends.items()},
            log_weights=take(self.log_weights, ("prompt",)),
            log_joint=take(self.log_joint, ("prompt",)),
            log_likelihood={name: take(x, ("prompt",)) for name, x in self.log_likelihood.items()},
            rewards={name: take(x, ("prompt",)) for name, x in self.rewards.items()},
            sample_stats={name: take(x, ("prompt",)[: x.ndim - 2]) for name, x in self.sample_stats.items()},
            pointwise={name: take(x, ()) for name, x in self.pointwise.items()},
            predictive={name: take(x, dims[name]) for name, x in self.predictive.items()},
        )


def _take(values: Array, dims: tuple[str, ...], index: Array) -> Array:
    """values[index] along the flattened (chain, draw), for each prompt by its own column of the index.

    :param dims: of the values after (chain, draw). Values without any get those of `index`.
    :param index: (chain, draw, prompt), or (chain, draw, 1) for all prompts.
    """
    flat = values.reshape(-1, *values.shape[2:])
    if index.shape[2] == 1:
        return flat[index[..., 0]]
    if not dims:
        return flat[index]
    axis = dims.index("prompt")
    by_prompt = np.moveaxis(flat, 1 + axis, 1)  # (chain * draw, prompt, ...)
    return np.moveaxis(by_prompt[index, np.arange(index.shape[2])], 2, 2 + axis)
