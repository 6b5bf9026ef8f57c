"""Evidence between bounds, and from them how far draws are from the posterior: bidirectional Monte Carlo.

Ẑ is a chain's estimate of Z, the mean of its N weights w. It is unbiased, so log Ẑ is low by Jensen's inequality.
Put an exact draw of the posterior π* in the place of one particle, and 1/Ẑ is unbiased for 1/Z: log Ẑ is high.

    E[log Ẑ] ≤ log Z ≤ E[log Ẑ | draw 0 ~ π*]

For importance sampling, draws of q with log w = log joint − log q:

    KL(q ‖ π*) = log Z − E_q[log w],    KL(π* ‖ q) = E_π*[log w] − log Z

For any sampler of weighted draws (importance sampling and particle systems alike), let s be the law of one draw
picked from a chain by weight. On the space of all N draws and the index picked, the law of the chain with a retained
draw has density Ẑ/Z with respect to that of the chain without. So log Z − E[log Ẑ] and E[log Ẑ | draw 0 ~ π*] − log Z
are the divergences there, and by the data processing inequality neither KL(s ‖ π*) nor KL(π* ‖ s) is larger.

Sources: Grosse, Ghahramani, Adams 2015, arXiv 1511.02543; Grosse, Ancha, Roy 2016, arXiv 1606.02275; the density is
that of Andrieu, Doucet, Holenstein 2010, Particle Markov chain Monte Carlo methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from bayeslm.weights import Array, Estimate, chain_log_evidence, checked

if TYPE_CHECKING:
    import pandas as pd

    from bayeslm.posterior import Posterior


def certify(runs: Posterior, conditional: Posterior, *, level: float = 0.95) -> pd.DataFrame:
    """Bounds on log Z and on divergences, in nats, one row a prompt; whatever the engines.

    `runs` are weighted draws or particles; `conditional` is a run with draws of the posterior retained
    (``retained=`` of `ImportanceSampling` or `SMC`). Each needs at least 2 chains, more for narrower intervals.

      log_evidence_lower, log_evidence_upper   means of log Ẑ over the chains of each, with `_se`
      log_evidence_low, _high         interval of log Z
      kl_to_posterior_low, _high      interval of KL(q ‖ π*), q being the law of one raw draw of `runs`
      kl_from_posterior_low, _high    interval of KL(π* ‖ q), q being that of `conditional`
      kl_sampler_high                 upper limit of KL(s ‖ π*) and KL(π* ‖ s) (the latter where both runs have the
                                      same settings), s being the law of one draw picked by weight from a chain

    An interval's ends are one-sided Student t limits over chains at (1 + level) / 2 (Welch's where two runs meet), so
    it holds the truth with probability `level` or more; a single upper limit's is at `level`. They are approximate
    where few chains have skewed log Ẑ. The columns of KL(q ‖ π*) and KL(π* ‖ q) are there where draws of `runs` and
    of `conditional` are "weighted": a raw particle has no known law. Retained draws that are not the posterior's make
    every upper bound wrong.
    Raises ValueError if the two runs are not what is said here, or of different prompts.
    """
    import pandas as pd

    _check(runs, conditional, level)
    below, above = checked(runs.log_weights), checked(conditional.log_weights)
    low, high = chain_log_evidence(below), chain_log_evidence(above)  # (chain, prompt)
    tail = (1 + level) / 2
    columns: dict[str, Array] = {}
    for name, chains in {"log_evidence_lower": low, "log_evidence_upper": high}.items():
        columns[name], columns[f"{name}_se"] = _mean(chains)
    columns |= {"log_evidence_low": _limit(1 - tail, low), "log_evidence_high": _limit(tail, high)}
    if runs.kind == "weighted":
        elbo = below.mean(axis=1)  # E_q[log w]
        gap = np.subtract(low, elbo, where=np.isfinite(elbo), out=np.full(low.shape, np.inf))
        columns["kl_to_posterior_low"] = np.maximum(_limit(1 - tail, gap), 0.0)
        columns["kl_to_posterior_high"] = np.maximum(_limit(tail, high, -elbo), 0.0)
    if conditional.kind == "weighted":
        eubo = above[:, 0]  # E_π*[log w]
        columns["kl_from_posterior_low"] = np.maximum(_limit(1 - tail, eubo - high), 0.0)
        columns["kl_from_posterior_high"] = np.maximum(_limit(tail, eubo, -low), 0.0)
    columns["kl_sampler_high"] = np.maximum(_limit(level, high, -low), 0.0)
    index = pd.Index(runs.prompt_labels, name="prompt")
    return pd.DataFrame({name: np.broadcast_to(x, len(index)) for name, x in columns.items()}, index=index)


def _mean(chains: Array) -> Estimate:
    """Mean over chains (chain, prompt) and its standard error; inf where the mean is infinite."""
    mean = chains.mean(axis=0)
    with np.errstate(invalid="ignore"):
        error = chains.std(axis=0, ddof=1) / np.sqrt(len(chains))
    return mean, np.where(np.isfinite(mean), error, np.inf)


def _limit(probability: float, *samples: Array) -> Array:
    """Student's limit of a sum of expectations, at most that with the probability given; each of its own chains.

    Source of the degrees of freedom: Welch 1947, The generalization of Student's problem.
    """
    means, errors = zip(*map(_mean, samples), strict=True)
    mean, squares = sum(means), [error**2 for error in errors]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = sum(squares) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, samples, strict=True))
        limit = mean + stdtrit(freedom, probability) * np.sqrt(sum(squares))
    return np.where(np.isfinite(limit), limit, mean)  # chains that all agree, or an infinite mean


def _check(runs: Posterior, conditional: Posterior, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    for name, posterior in {"runs": runs, "conditional": conditional}.items():
        if posterior.kind not in ("weighted", "particles"):
            raise ValueError(f"{name} must hold weighted draws or particles: {posterior.kind} ones bound no evidence")
        if posterior.conditional != (name == "conditional"):
            retained = "no" if name == "conditional" else "a"
            raise ValueError(
                f"{name} has {retained} retained draw of the posterior in its chains: certify takes runs without one, "
                "then a conditional run with one (ImportanceSampling(retained=...))"
            )
        if len(posterior.log_weights) < 2:
            raise ValueError(f"{name} has 1 chain: intervals need at least 2 (num_chains), and 10 or more are better")
    if runs.prompts != conditional.prompts or runs.log_weights.shape[2] != conditional.log_weights.shape[2]:
        raise ValueError("runs and conditional must be of the same prompts")
