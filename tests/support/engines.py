"""Every engine, in settings small enough for a test, with its claims. A new engine needs an entry in `ENGINES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.models import table_lm

from bayeslm.inference import (
    MCMC,
    NUTS,
    SMC,
    SVI,
    AdaptiveImportance,
    AnnealedSMC,
    Auto,
    BestOfN,
    Exact,
    ImportanceSampling,
    RejectionSampling,
)
from bayeslm.inference.training import Adam
from bayeslm.models import LanguageModel


@dataclass(frozen=True)
class Claims:
    """What an engine gives; `test_laws.py` skips the laws that do not concern it.

    :param make: the engine from a seed, an upper bound of the log-likelihood, and a number that scales its size.
    :param posterior: its draws, weighted or not, are the posterior's (best-of-n's are not).
    :param evidence: it estimates log Z.
    :param unbiased: E[Z-hat] = Z, at any size.
    :param texts: it infers completions; else only continuous latents.
    :param continuous: it infers continuous latents.
    :param prior: it keeps draws of the prior.
    :param trains: it gives a policy.
    :param constraints: rewards may be -inf.
    """

    make: Callable[[int, float, int], Any]
    posterior: bool = True
    evidence: bool = True
    unbiased: bool = True
    texts: bool = True
    continuous: bool = True
    prior: bool = True
    trains: bool = False
    constraints: bool = True
    exact: bool = False


def sized(cls: type, size: str, number: int, **settings: Any) -> Callable[[int, float, int], Any]:
    """An engine whose setting ``size`` is ``number`` times the scale."""
    return lambda seed, bound, k: cls(**{size: number * k}, seed=seed, progress=False, **settings)


def flat_policy() -> LanguageModel:
    """A proposal that is nearly uniform: its weights have no heavy tail."""
    lm = table_lm(2, seed=9, vocab=4)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter *= 0.3
    return lm


ENGINES = {
    "exact": Claims(lambda seed, bound, k: Exact(seed=seed), continuous=False, exact=True),
    "importance": Claims(sized(ImportanceSampling, "num_particles", 20, num_chains=20)),
    "importance, policy": Claims(
        sized(ImportanceSampling, "num_particles", 20, num_chains=20, guide=flat_policy()),
        continuous=False,
        prior=False,
    ),
    "rejection": Claims(
        lambda seed, bound, k: RejectionSampling(
            num_samples=5 * k,
            num_chains=20,
            max_proposals=20_000 * k,  # enough for acceptance rates of 0.5%; a test spends all
            log_bound=bound,
            seed=seed,
            progress=False,
        ),
        unbiased=False,  # the number of proposals depends on the draws
    ),
    "bestofn": Claims(
        sized(BestOfN, "num_samples", 5, n=4, num_chains=20),
        posterior=False,
        unbiased=False,  # its chains are of draws, Z-hat is of the candidates
    ),
    "svi": Claims(
        sized(SVI, "num_samples", 400, num_steps=5, num_particles=8, optimizer=Adam()),  # rounding grows in a region
        unbiased=False,  # one policy's draws are; as few as 5 steps leave weights with a heavy tail
        trains=True,
        constraints=False,
    ),
    "adaptive": Claims(
        sized(AdaptiveImportance, "num_particles", 200, round_size=50, num_steps=6, train_below=1.0),
        unbiased=False,  # `test_adaptive_importance.py` has enough replicates to tell
        trains=True,
    ),
    "auto": Claims(
        lambda seed, bound, k: Auto(target_ess=1e6, num_particles=400 * k, seed=seed, progress=False),
        unbiased=False,  # its draws decide how many there are, and of what
    ),
    "smc": Claims(
        sized(SMC, "num_particles", 10, num_chains=40, twist="partial", ess_threshold=0.9),
        prior=False,
    ),
    "smc, default": Claims(sized(SMC, "num_particles", 10, num_chains=40), prior=False),
    "smc, induced": Claims(
        sized(SMC, "num_particles", 10, num_chains=40, twist="partial", proposal="twist", top_k=3), prior=False
    ),
    "annealed": Claims(
        sized(AnnealedSMC, "num_particles", 10, num_chains=40),
        unbiased=False,  # its ladder adapts to its particles
    ),
    "annealed, fixed ladder": Claims(sized(AnnealedSMC, "num_particles", 10, num_chains=40, ladder=(0.3, 0.6, 1.0))),
    "mcmc": Claims(sized(MCMC, "num_samples", 10, num_chains=40, warmup=20), evidence=False, unbiased=False),
    "mcmc, tempered": Claims(
        sized(MCMC, "num_samples", 10, num_chains=30, warmup=20, num_temperatures=3), evidence=False, unbiased=False
    ),
    "nuts": Claims(
        sized(NUTS, "num_samples", 25, num_chains=4, warmup=60), evidence=False, unbiased=False, texts=False
    ),
}


def those(**claims: bool) -> list[str]:
    """Names of the engines of which all of these claims hold."""
    return [name for name, entry in ENGINES.items() if all(getattr(entry, c) == wanted for c, wanted in claims.items())]
