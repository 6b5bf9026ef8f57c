r"""The same draws at another beta: a frontier of reward against KL from one run.

    w'_i = w_i \exp(r_i / \beta' - r_i / \beta)

Draws of any proposal are weighted draws of the posterior at any beta (Owen 2013, ch. 9); how many of them count there
is what the effective sample size and k-hat say.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bayeslm.posterior import Posterior
from bayeslm.validation import Positive, validated
from bayeslm.weights import chain_log_evidence, log_evidence, quality

WEIGHTED = ("weighted", "enumerated")


@validated
def at_beta(posterior: Posterior, beta: Positive) -> Posterior:
    """Return the draws of a run with the weights that they have at another beta.

    ``stats`` keeps what the draws cost. A limit of log Z for what was not seen is left out.

    :param posterior: weighted draws (of `ImportanceSampling`, `SVI`, `AdaptiveImportance`) or an enumeration, of a
        program with one reward.
    :param beta: the new KL coefficient.
    :raises ValueError: if the draws are of another kind, whose density under their proposal is not known; or if the
        program records no reward or several, or the reward's factor is not exp(r / beta) alone.
    """
    if posterior.kind not in WEIGHTED or posterior.conditional:
        kind = "conditional" if posterior.conditional else posterior.kind
        raise ValueError(
            f"at_beta needs weighted draws or an enumeration, not {kind} ones: run {posterior.engine} again"
        )
    if len(posterior.rewards) != 1 or not posterior.rewards.keys() <= posterior.log_likelihood.keys():
        raise ValueError(
            f"at_beta needs a program with one reward and its factor, and this one records {sorted(posterior.rewards)} "
            f"with factors {sorted(posterior.log_likelihood)}: say the reward by rewards.factor"
        )
    (name,) = posterior.rewards
    r, old = posterior.rewards[name], posterior.log_likelihood[name]
    new = r / beta
    alive = np.isfinite(old)
    _check_factor(name, r[alive & (r != 0)], old[alive & (r != 0)])
    change = np.where(alive, new - np.where(alive, old, 0.0), 0.0)  # a weight of 0 is 0 at every beta
    if posterior.log_weights.shape[2] == 1:
        change = change.sum(2, keepdims=True)
    log_weights = posterior.log_weights + change
    estimate, stderr = log_evidence(log_weights)
    is_weighted = posterior.kind == "weighted"
    prior = dict(posterior.prior)
    if name in prior and name in posterior.prior_rewards:
        prior[name] = posterior.prior_rewards[name] / beta
    return replace(
        posterior,
        log_weights=log_weights,
        log_joint=posterior.log_joint + change,
        log_likelihood=posterior.log_likelihood | {name: new},
        log_evidence=estimate,
        log_evidence_stderr=stderr if is_weighted else np.zeros_like(estimate),
        log_evidence_lower=chain_log_evidence(log_weights).mean(0) if is_weighted else None,
        log_evidence_high=None,
        prior=prior,
        stats={k: v for k, v in posterior.stats.items() if k not in ("khat_reason", "log_bound")}
        | (quality(log_weights) if is_weighted else {}),
    )


def _check_factor(name: str, r: np.ndarray, term: np.ndarray) -> None:
    """Check that a factor is r / beta for one beta.

    :raises ValueError: if it is not.
    """
    ratio = term / r
    if ratio.size and not np.allclose(ratio, ratio[0], rtol=1e-3):
        raise ValueError(
            f"the factor {name!r} is not its reward divided by one beta (factor / reward is between {ratio.min():.4g} "
            f"and {ratio.max():.4g}): at_beta cannot say what it is at another"
        )
