"""Quality of a posterior and its distance from the prior, for every engine, with Monte Carlo standard errors.

Notation: prior p(x), likelihood exp(l(x)) with l = r/β, joint p(x) exp(l(x)), evidence Z = E_p[exp l], posterior
π* = joint / Z, and q the distribution of the raw draws, with weights w = joint / q.

Arrays are (chain, draw, prompt); information is in nats. An estimate pools chains and draws; it is a pair (estimate,
standard error), both (prompt,). If prompts share a latent, they have one joint posterior and "prompt" has length 1.
Standard errors are by the delta method: each draw has an influence φ on the estimator, whose variance is var(φ) / N for
independent draws (of the jackknife where their ESS is below 100) and var(φ) / ESS for a Markov chain; particles that
descend from one root count as one draw (see `weights.standard_error`). A standard error that is unknown (a single draw,
an infinite estimate) is inf. All estimates, log Z, E[r], KL and entropy, are by the same weights, the raw ones, so that
KL(π* ‖ p) = E[l] − log Z holds for them.

A log weight may be −inf (a draw that breaks a constraint); NaN and +inf raise ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslm.bounds import certify
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.weights import (
    POOL,
    Array,
    Estimate,
    as_log_weights,
    chain_log_evidence,
    ess,
    evidence_influence,
    has_small_ess,
    jackknife_influence,
    khat_reasons,
    log_evidence,
    normalise,
    num_draws,
    num_roots,
    psis,
    quality,
    smallest_ess,
    standard_error,
)

from .validation import Shape, validated

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "best_of_n_kl_bound",
    "certify",
    "chain_log_evidence",
    "compare",
    "distinct_n",
    "entropy",
    "ess",
    "ess_bulk",
    "expectation",
    "khat_reasons",
    "kl_to_posterior",
    "kl_to_prior",
    "log_evidence",
    "num_roots",
    "psis",
    "quality",
    "rhat",
    "smallest_ess",
    "summary",
]


@validated
def rhat(values: Annotated[ArrayLike, Shape("chain, draw, ...")]) -> Array:
    """Return the rank-normalised split R̂ of any quantity, as ArviZ does, of all quantities at once.

    Below 1.01 the chains agree. A single chain is cut in two first, so that its quarters are compared.

    With z the normal scores of the ranks of all draws, W the mean variance within the halves of chains and B that of
    their means, of S draws each, R̂² = (S − 1)/S + B/W; the larger of that of the draws and that of their distances
    from the median. Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, arXiv 1903.08008.

    :param values: (chain, draw, ...).
    :returns: (...); NaN for a constant quantity, and for fewer than four draws in a chain.
    """
    array = np.asarray(values, dtype=float)
    if array.shape[0] == 1:
        half = array.shape[1] // 2
        array = np.concatenate([array[:, :half], array[:, half : 2 * half]])
    if array.shape[1] < 4:
        return np.full(array.shape[2:], np.nan)
    halves = np.moveaxis(_halves(array), (0, 1), (-2, -1))  # (..., half of a chain, draw)
    with np.errstate(all="ignore"):
        bulk = _rhat_of_ranks(halves)
        tail = _rhat_of_ranks(np.abs(halves - np.median(halves, axis=(-2, -1), keepdims=True)))
        return np.where(np.isnan(halves).any((-2, -1)), np.nan, np.where(tail > bulk, tail, bulk))


def _halves(chains: Array) -> Array:
    """Return the halves of chains (chain, draw, ...) as chains; the draw in the middle of an odd number is left out."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, chains.shape[1] - half :]])


def _rhat_of_ranks(chains: Array) -> Array:
    """Return R̂ (...) of the normal scores of chains (..., chain, draw)."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    pooled = chains.reshape(*chains.shape[:-2], -1)
    size, draws = pooled.shape[-1], chains.shape[-1]
    scores = ndtri((rankdata(pooled, axis=-1) - 3 / 8) / (size + 1 / 4)).reshape(chains.shape)
    between = draws * scores.mean(-1).var(-1, ddof=1)
    within = scores.var(-1, ddof=1).mean(-1)
    return np.asarray(np.sqrt((between / within + draws - 1) / draws))


@validated
def ess_bulk(values: Annotated[ArrayLike, Shape("chain, draw, ...")]) -> Array:
    """Return the bulk effective sample size of equally weighted draws, by ArviZ. Source: as for `rhat`.

    :param values: (chain, draw, ...).
    :returns: (...); NaN for fewer than four draws in a chain.
    """
    from bayeslm.arviz_versions import statistic

    return statistic("ess", np.asarray(values, dtype=float), method="bulk")


@validated
def expectation(posterior: PosteriorDraws, values: ArrayLike, *, weighted: bool = True) -> Estimate:
    """Estimate E[values] under the posterior, or with ``weighted=False`` under q, the distribution of the raw draws.

    For weighted draws and particles by self-normalised importance sampling with their raw weights, μ = Σwf / Σw with
    φ = N w (f − μ) / Σw; for equally weighted draws by the plain mean; for an enumeration exactly, with standard error
    0. Infinite values of draws of zero weight do not count.
    Source: Owen 2013, ch. 9.

    :param values: (chain, draw, prompt); the last axis may have any length if prompts share a latent.
    :raises ValueError: on a wrong shape, or if every weight of a prompt is zero.
    """
    mean, influence = _mean(posterior, values, weighted)
    return mean, _stderr(posterior, mean, influence)


@validated
def kl_to_prior(posterior: PosteriorDraws, *, weighted: bool = True) -> Estimate:
    """Estimate KL(π* ‖ p) = E_π*[l] − log Z; with ``weighted=False`` KL(q ‖ p) = E_q[l − log w], the penalty of RL.

    Source: Korbak, Perez, Buckley 2022, arXiv 2205.11275.

    :returns: NaN where it is unknown: if the engine gives no evidence, or with ``weighted=False`` if draws have zero
        weight (log w and l are both −inf there, so log q cannot be recovered).
    :raises ValueError: for uncorrected draws, whose distribution is unknown (for best-of-n see `best_of_n_kl_bound`);
        with ``weighted=False`` also for particles and conditional runs, whose single draws have no known distribution.
    """
    likelihood = posterior.total_log_likelihood()
    if _concerns_q(posterior, weighted):
        return expectation(posterior, _difference(likelihood, posterior.log_weights), weighted=False)
    return _mean_over_evidence(posterior, likelihood)


@validated
def kl_to_posterior(
    posterior: PosteriorDraws, reference: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None
) -> Estimate:
    """Estimate KL(q ‖ π*) = log Z − E_q[log w], q being the distribution of the raw draws, such as a trained policy's.

    By default log Z is estimated from the same draws, so φ = w / mean(w) − 1 − (log w − mean(log w)). That estimate is
    low, as that of log Z is, and does not see modes that q never visits.
    Source: the gap of the ELBO; bounds from both sides: Grosse, Ghahramani, Adams 2015, arXiv 1511.02543.

    :param reference: log Z, taken as exact, for all prompts or (prompt,); or a tuple of bounds (lower, upper).
    :returns: (prompt,), or (2, prompt) for bounds; inf where q has mass and π* has none.
    :raises ValueError: unless the draws are weighted and all from q; for particles see `certify`.
    """
    if not _has_known_q(posterior):
        kind = "conditional" if posterior.conditional else posterior.kind
        raise ValueError(f"KL(q ‖ posterior) needs weighted draws of a known distribution, not {kind} ones")
    lw = as_log_weights(posterior.log_weights)
    mean, influence = _mean(posterior, lw, weighted=False)
    if reference is None:
        log_z, influence = log_evidence(lw)[0], evidence_influence(lw) - influence
    elif isinstance(reference, tuple):
        log_z = np.stack([np.broadcast_to(np.asarray(bound, dtype=float), mean.shape) for bound in reference])
    else:
        log_z = np.broadcast_to(np.asarray(reference, dtype=float), mean.shape)
    gap = log_z - mean
    return gap, np.broadcast_to(standard_error(mean, influence), gap.shape)


@validated
def entropy(posterior: PosteriorDraws, *, weighted: bool = True) -> Estimate:
    """Estimate the entropy H(π*) = log Z − E_π*[log joint]; with ``weighted=False`` H(q) = −E_q[log joint − log w].

    It is that of all latents jointly: Shannon's for discrete latents, differential for continuous ones.

    :returns: NaN where it is unknown: if the engine gives no evidence, or with ``weighted=False`` if draws have zero
        weight.
    :raises ValueError: for uncorrected draws; with ``weighted=False`` also for particles and conditional runs.
    """
    if _concerns_q(posterior, weighted):
        mean, stderr = expectation(posterior, _difference(posterior.log_joint, posterior.log_weights), weighted=False)
    else:
        mean, stderr = _mean_over_evidence(posterior, posterior.log_joint)
    return -mean, stderr


@validated
def distinct_n(tokens: ArrayLike, lengths: ArrayLike, n: int = 2) -> Array:
    """Return the share of distinct n-grams among all n-grams of a prompt's completions, in (0, 1].

    Compare it at equal numbers of draws: more draws repeat more.
    Source: Li, Galley, Brockett, Gao, Dolan 2016, arXiv 1510.03055.

    :param tokens: (chain, draw, prompt, token).
    :param lengths: (chain, draw, prompt), the number of tokens before padding.
    :returns: (prompt,); NaN where no completion has n tokens.
    :raises ValueError: if n < 1 or shapes do not agree.
    """
    ids, length = np.asarray(tokens), np.asarray(lengths)
    if n < 1:
        raise ValueError(f"n-grams have at least one token, so n must be at least 1, not {n}")
    if ids.ndim != 4 or ids.shape[:3] != length.shape:
        raise ValueError(
            "tokens must be (chain, draw, prompt, token) and lengths (chain, draw, prompt), "
            f"not {ids.shape} and {length.shape}"
        )
    ratios = np.full(ids.shape[2], np.nan)
    if ids.shape[3] >= n:
        grams = np.lib.stride_tricks.sliding_window_view(ids, n, axis=3)  # (chain, draw, prompt, position, n)
        complete = np.arange(grams.shape[3]) + n <= length[..., None]
        base = ids.max() + 1
        for prompt in range(ids.shape[2]):
            if (found := grams[:, :, prompt][complete[:, :, prompt]]).size:  # (n-gram, n)
                code = np.zeros(len(found), dtype=np.int64)  # of each prefix; integers sort far faster than rows
                for column in found.T:
                    code = np.unique(code * base + column, return_inverse=True)[1]
                ratios[prompt] = (code.max() + 1) / len(found)
    return ratios


@validated
def best_of_n_kl_bound(n: int) -> float:
    """Return log n − (n − 1)/n, an upper bound on KL(best-of-n ‖ p) that is exact if rewards have no ties.

    Source: Beirami et al. 2024, arXiv 2401.01879.

    :raises ValueError: if n < 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, not {n}")
    return float(np.log(n) - (n - 1) / n)


@validated
def summary(
    posterior: PosteriorDraws,
    reference_log_evidence: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    *,
    weighted: bool = True,
) -> pd.DataFrame:
    """Return a table with a row for each prompt.

    Columns are mean rewards of prior and posterior, divergences, evidence, convergence, diversity and cost. Where no
    reward is recorded, or several are (`Posterior.measure`), "log_likelihood" takes the place of "reward" in their
    names, and each of several rewards has a column "reward_<name>". Columns ending in "_se" are standard errors;
    "log_evidence_high" is an upper limit of log Z that counts what was not seen, and "khat_reason" says why k̂ is NaN. A
    column that the posterior's kind cannot have is left out; an unknown value is NaN. If prompts share a latent, rows
    repeat the values of their joint posterior.

    :param reference_log_evidence: log Z for "kl_to_posterior", which is that of the raw draws even if ``weighted`` (see
        `kl_to_posterior`); bounds give the columns "kl_to_posterior_lower" and "kl_to_posterior_upper".
    :param weighted: False describes the distribution of the raw draws, such as a trained policy's own.
    :raises ValueError: as the function for each column does.
    """
    import pandas as pd

    rows = len(posterior.prompts)
    draws = posterior.resample() if weighted else posterior
    columns: dict[str, Any] = {}

    def add(name: str, estimate: Estimate) -> None:
        columns[name], columns[f"{name}_se"] = estimate

    measure = posterior.measure.replace("-", "_")
    if (prior := posterior.prior_measured) is not None:
        mean = prior.mean(axis=POOL)
        add(f"{measure}_prior", (mean, standard_error(mean, prior - mean)))
    add(measure, expectation(posterior, posterior.measured, weighted=weighted))
    if len(posterior.rewards) > 1:
        for name, reward in posterior.rewards.items():
            add(f"reward_{name}", expectation(posterior, reward, weighted=weighted))
    if posterior.kind != "uncorrected":
        add("kl_to_prior", kl_to_prior(posterior, weighted=weighted))
    if _has_known_q(posterior):
        gap, stderr = kl_to_posterior(posterior, reference_log_evidence)
        if gap.ndim == 2:
            columns |= {"kl_to_posterior_lower": gap[0], "kl_to_posterior_upper": gap[1]}
            columns["kl_to_posterior_se"] = stderr[0]
        else:
            add("kl_to_posterior", (gap, stderr))
    add("log_evidence", (posterior.log_evidence, posterior.log_evidence_stderr))
    if posterior.log_evidence_high is not None:
        columns["log_evidence_high"] = posterior.log_evidence_high
    if posterior.kind == "weighted":
        columns |= quality(posterior.log_weights)
        if "khat_reason" in columns:
            columns["khat_reason"] = np.array(columns["khat_reason"], dtype=object)
    elif posterior.roots is not None:
        columns |= {
            "ess": ess(posterior.log_weights),
            "ess_min": smallest_ess(posterior.log_weights, posterior.stats.get("ess_by_step")),
        }
        columns["roots"] = num_roots(posterior.roots)
    elif posterior.kind != "enumerated":
        columns["ess"] = ess_bulk(posterior.measured)
    if posterior.kind != "enumerated":
        columns[f"rhat_{measure}"] = rhat(draws.measured)
    if posterior.kind != "uncorrected":
        add("entropy", entropy(posterior, weighted=weighted))
    for site, length in draws.lengths.items():
        suffix = "" if len(draws.lengths) == 1 else f"_{site}"
        if length.shape[2:] == (rows,):
            if posterior.kind != "enumerated":
                columns[f"rhat_length{suffix}"] = rhat(length)
            columns[f"distinct_2{suffix}"] = distinct_n(draws.samples[site], length)
    if "seconds" in (stats := posterior.stats):
        columns["seconds"] = np.asarray(stats["seconds"])
        if "tokens" in stats:
            columns["tokens_per_second"] = np.asarray(stats["tokens"]) / np.maximum(columns["seconds"], 1e-9)
    labels = [label.encode(errors="backslashreplace").decode() for label in posterior.prompt_labels]
    index = pd.Index(labels, name="prompt")  # which cannot hold lone surrogates
    return pd.DataFrame({name: np.broadcast_to(values, rows) for name, values in columns.items()}, index=index)


@validated
def compare(
    posteriors: Mapping[str, PosteriorDraws],
    reference_log_evidence: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    *,
    weighted: bool = True,
) -> pd.DataFrame:
    """Return the summaries of several posteriors, stacked; NaN where one lacks a column of another.

    Parameters and errors are those of `summary`.
    """
    import pandas as pd

    if not posteriors:
        raise ValueError("posteriors must hold one at least, got an empty mapping")
    tables = {
        name: summary(posterior, reference_log_evidence, weighted=weighted) for name, posterior in posteriors.items()
    }
    return pd.concat(tables, names=["posterior"])


def _mean(posterior: PosteriorDraws, values: ArrayLike, weighted: bool) -> tuple[Array, Array]:
    """Return the mean (prompt,) and the influence of each draw on it (chain, draw, prompt)."""
    values, shape = np.asarray(values, dtype=float), posterior.log_weights.shape
    if values.ndim != 3 or values.shape[:2] != shape[:2] or shape[2] not in (1, values.shape[2]):
        raise ValueError(f"values must be (chain, draw, prompt), so {shape}, not {values.shape}")
    if not weighted and posterior.kind == "enumerated":
        raise ValueError("an enumeration lists every value once: weighted=False is undefined for it")
    relative = np.ones(shape)
    if weighted and posterior.kind in ("enumerated", "weighted", "particles"):
        relative = np.exp(normalise(posterior.log_weights)) * num_draws(values)
    with np.errstate(invalid="ignore"):  # 0 · inf counts as 0; inf − inf has no standard error
        mean = np.where(relative > 0, relative * values, 0.0).mean(axis=POOL)
        influence = np.where(relative > 0, relative * (values - mean), 0.0)
        if weighted and posterior.kind == "weighted" and (few := has_small_ess(posterior.log_weights)).any():
            without = mean - np.where(influence == 0, 0.0, influence / (num_draws(values) - relative))
            influence = np.where(few, jackknife_influence(without), influence)
        return mean, influence


def _stderr(posterior: PosteriorDraws, estimate: Array, influence: Array) -> Array:
    if posterior.kind == "enumerated":
        return np.zeros(estimate.shape)
    if posterior.kind in ("markov", "uncorrected"):  # successive draws may be correlated
        from bayeslm.arviz_versions import statistic

        return standard_error(estimate, influence, size=statistic("ess", influence, method="mean"))
    return standard_error(estimate, influence, roots=posterior.roots)


def _mean_over_evidence(posterior: PosteriorDraws, values: Array) -> Estimate:
    """Estimate E_π*[values] − log Z. With weights both come from the same draws, so their influences subtract."""
    mean, influence = _mean(posterior, values, weighted=True)
    if posterior.kind in ("weighted", "particles") and not posterior.conditional:
        lw = as_log_weights(posterior.log_weights)
        difference = influence - evidence_influence(lw, posterior.roots)
        return mean - log_evidence(lw)[0], standard_error(mean, difference, roots=posterior.roots)
    own = _stderr(posterior, mean, influence)
    known = np.where(np.isnan(posterior.log_evidence_stderr), np.inf, posterior.log_evidence_stderr)
    return mean - posterior.log_evidence, np.hypot(own, known)


def _concerns_q(posterior: PosteriorDraws, weighted: bool) -> bool:
    """Whether an estimate concerns q; checks that the distribution it concerns is known."""
    if posterior.kind == "uncorrected":
        raise ValueError("the distribution of uncorrected draws is unknown: they have no divergence and no entropy")
    if not weighted and (posterior.kind == "particles" or posterior.conditional):
        kind = "conditional" if posterior.conditional else posterior.kind
        raise ValueError(
            f"single draws have no known distribution ({kind}), so no divergence and no entropy: see certify"
        )
    return posterior.kind == "weighted" and not weighted


def _has_known_q(posterior: PosteriorDraws) -> bool:
    """Whether the raw draws are independent draws of one distribution q, whose density follows from the weights."""
    return posterior.kind == "weighted" and not posterior.conditional


def _difference(left: Array, right: Array) -> Array:
    with np.errstate(invalid="ignore"):  # −inf − −inf is NaN: unknown
        return left - right
