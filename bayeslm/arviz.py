"""The groups of an ArviZ container: the arrays of a posterior with names for their dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import xarray

from bayeslm.version import __version__
from bayeslm.weights import Array

Variables = dict[str, tuple[tuple[str, ...], Array]]  # name -> (dims, values)

ALIGNMENT = (
    "posterior, sample_stats, log_prior, log_likelihood and texts hold the same equally weighted draws, resampled by "
    "weight from the group proposal (jointly over chains and draws, in order; each prompt on its own unless "
    "prompts share a latent). log_weight and lp in sample_stats are those of the draw picked: no weight is "
    "left to apply. Independent draws of one run are divided into four chains."
)
CHAINS = 4  # into which independent draws are divided: R-hat compares chains
MIN_DRAWS = 4  # of a chain, for R-hat and ESS
ALIGNED = ("posterior", "texts", "sample_stats", "log_prior", "log_likelihood", "posterior_predictive")
INDEPENDENT = ("exact", "weighted", "uncorrected")


class PosteriorFields(Protocol):
    """The fields of a `bayeslm.Posterior` that the groups are made of."""

    samples: dict[str, Array]
    log_weights: Array
    log_joint: Array
    log_likelihood: dict[str, Array]
    rewards: dict[str, Array]
    dims: dict[str, tuple[str, ...]]
    prompts: list[str]
    texts: dict[str, Array]
    lengths: dict[str, Array]
    truncated: dict[str, Array]
    pointwise: dict[str, Array]
    predictive: dict[str, Array]
    sample_stats: dict[str, Array]
    kind: str
    conditional: bool
    prior: dict[str, Array]
    prior_rewards: dict[str, Array]
    observed: dict[str, Array]


def make_groups(draws: PosteriorFields, posterior: PosteriorFields) -> dict[str, Variables]:
    """Return the variables of each group; a slash in a site's name becomes a dot. Empty groups are left out.

    :param draws: the draws of ``posterior`` after resampling by weight, each with the log weight that it had before.
    """
    observed = {name: (_observed_dims(posterior, name, x), x) for name, x in posterior.observed.items()}
    replicated = _observations(draws, draws.predictive)
    groups: dict[str, Variables] = {
        "posterior": _numbers(draws),
        "texts": _texts(draws),
        "sample_stats": _stats(draws) | _per_prompt(draws, draws.sample_stats),
        "log_prior": _per_prompt(draws, {"latents": _log_prior(draws)}),
        "log_likelihood": _log_likelihood(draws),
        "posterior_predictive": _without_tokens(replicated),
        "prior": _prior(posterior),
        "observed_data": _without_tokens(observed),
    }
    if not np.all(posterior.log_weights == posterior.log_weights[0, 0]):  # (−inf − −inf would be NaN)
        groups["proposal"] = _numbers(posterior) | _token_ids(posterior) | _stats(posterior)
    chains = dict.fromkeys(ALIGNED, _chains(draws)) | {"proposal": _chains(posterior)}
    return {
        group: {
            name.replace("/", "."): (dims, _divided(x, chains[group]) if group in chains else x)
            for name, (dims, x) in variables.items()
        }
        for group, variables in groups.items()
        if variables
    }


def make_datasets(groups: Mapping[str, Variables], prompt_labels: list[str]) -> dict[str, xarray.Dataset]:
    """Return the groups as data sets with a coordinate for each dimension."""
    sizes = _sizes(groups)
    labels = _printable(np.array(prompt_labels, dtype=object))
    return {group: _dataset(variables, sizes, labels) for group, variables in groups.items()}


def make_attrs(engine: str, kind: str) -> dict[str, str]:
    """Return the attributes of the container."""
    return {
        "engine": engine,
        "kind": kind,
        "inference_library": "bayeslm",
        "inference_library_version": __version__,
        "alignment": ALIGNMENT,
    }


def _sample_dims(posterior: PosteriorFields, name: str) -> tuple[str, ...]:
    return ("chain", "draw", *posterior.dims.get(name, ()))


def _numbers(posterior: PosteriorFields) -> Variables:
    """Rewards, lengths of texts, and latents other than texts."""
    lengths = {f"{name}_length": (_sample_dims(posterior, name)[:-1], n) for name, n in posterior.lengths.items()}
    others = {name: x for name, x in posterior.samples.items() if name not in posterior.lengths}
    samples = {name: (_sample_dims(posterior, name), x) for name, x in others.items()}
    return _per_prompt(posterior, posterior.rewards) | lengths | samples


def _token_ids(posterior: PosteriorFields) -> Variables:
    return {f"{name}_ids": (_sample_dims(posterior, name), posterior.samples[name]) for name in posterior.lengths}


def _texts(posterior: PosteriorFields) -> Variables:
    strings = {name: (_sample_dims(posterior, name)[:-1], _printable(x)) for name, x in posterior.texts.items()}
    cut = {f"{name}_truncated": (_sample_dims(posterior, name)[:-1], x) for name, x in posterior.truncated.items()}
    return strings | _token_ids(posterior) | cut


def _without_tokens(variables: Variables) -> Variables:
    """Leave out token ids: an observed text is no number that a replicated one could be compared with."""
    return {name: (dims, x) for name, (dims, x) in variables.items() if dims[-1:] != ("token",)}


def _log_prior(draws: PosteriorFields) -> Array:
    """log p of the latents (chain, draw, prompt); −inf where the likelihood is 0, as nothing is known there."""
    likelihood = np.zeros(draws.log_joint.shape)
    for term in draws.log_likelihood.values():
        likelihood = likelihood + (term if term.shape == likelihood.shape else term.sum(axis=2, keepdims=True))
    alive = np.isfinite(likelihood)
    return np.where(alive, draws.log_joint - np.where(alive, likelihood, 0.0), -np.inf)


def _log_likelihood(draws: PosteriorFields) -> Variables:
    """Of observed data alone, each observation where they are kept: a factor is no data that could be left out."""
    of_data = {name: x for name, x in draws.log_likelihood.items() if name in draws.observed}
    return _per_prompt(draws, of_data) | _observations(draws, draws.pointwise)


def _prior(posterior: PosteriorFields) -> Variables:
    """Draws of the prior of what the group posterior holds."""
    left_out = posterior.log_likelihood.keys() | posterior.lengths.keys()
    values = {name: x for name, x in posterior.prior.items() if name not in left_out}
    of_sites = {name: (_prior_dims(posterior, name, x), x) for name, x in values.items()}
    return of_sites | _per_prompt(posterior, posterior.prior_rewards)


def _stats(posterior: PosteriorFields) -> Variables:
    return _per_prompt(posterior, {"log_weight": posterior.log_weights, "lp": posterior.log_joint})


def _per_prompt(posterior: PosteriorFields, values: Mapping[str, Array]) -> Variables:
    """Values (chain, draw, prompt); without the last dimension where all prompts share one value."""
    rows = len(posterior.prompts)
    return {
        name: (("chain", "draw", "prompt"), x)
        if x.shape[2:] == (rows,)
        else (("chain", "draw"), x.reshape(x.shape[:2]))
        for name, x in values.items()
    }


def _chains(posterior: PosteriorFields) -> int:
    """Return the number of chains that draws have in the container.

    Independent draws of one run are divided into four, or fewer if each would have less than four draws, or not equally
    many. Of a number of draws that nothing divides, up to three are left out.
    """
    chains, size = posterior.log_weights.shape[:2]
    if chains > 1 or posterior.conditional or posterior.kind not in INDEPENDENT:
        return chains
    fit = [k for k in range(CHAINS, 1, -1) if size >= k * MIN_DRAWS]
    return next((k for k in fit if size % k == 0), max(fit, default=1))


def _divided(values: Array, chains: int) -> Array:
    """Return draws (1, draw, ...) as (chain, draw, ...), in their order; those of several chains unchanged."""
    if len(values) == chains:
        return values
    size = values.shape[1] // chains
    return values[:, : chains * size].reshape(chains, size, *values.shape[2:])


def _observations(posterior: PosteriorFields, values: Mapping[str, Array]) -> Variables:
    return {name: (_sample_dims(posterior, name)[: x.ndim], x) for name, x in values.items()}


def _prior_dims(posterior: PosteriorFields, name: str, value: Array) -> tuple[str, ...]:
    """The dims of the sample of the same name; of "<site>_length" the site's; of a factor those of the prompts."""
    site = name.removesuffix("_length")
    dims: tuple[str, ...] = ("chain", "draw", *(f"{name}_dim_{axis}" for axis in range(value.ndim - 2)))
    if name in posterior.samples:
        dims = _sample_dims(posterior, name)
    elif site in posterior.lengths:
        dims = _sample_dims(posterior, site)[:-1]
    elif value.shape[2:] == (len(posterior.prompts),):
        dims = ("chain", "draw", "prompt")
    return dims


def _observed_dims(posterior: PosteriorFields, name: str, value: Array) -> tuple[str, ...]:
    if len(dims := posterior.dims.get(name, ())) == value.ndim:
        return dims
    own = [f"{name}_dim_{axis}" for axis in range(value.ndim)]
    return ("prompt", *own[1:]) if value.shape[:1] == (len(posterior.prompts),) else tuple(own)


def _sizes(groups: Mapping[str, Variables]) -> dict[str, set[int]]:
    """The sizes each dim has over all variables: completions of two sites may differ in length."""
    sizes: dict[str, set[int]] = {}
    for variables in groups.values():
        for dims, value in variables.values():
            for dim, size in zip(dims, value.shape, strict=True):
                sizes.setdefault(dim, set()).add(size)
    return sizes


def _dataset(variables: Variables, sizes: Mapping[str, set[int]], labels: Array) -> xarray.Dataset:
    """Return a data set; a dim that has several sizes in the container becomes "<variable>_<dim>" of each variable."""

    def own(name: str, dim: str) -> str:
        return f"{name}_{dim}" if dim not in ("chain", "draw") and len(sizes[dim]) > 1 else dim

    arrays = {
        name: (
            [own(name, dim).replace("/", ".") for dim in dims],
            value.astype(np.int8) if value.dtype == bool else value,
        )
        for name, (dims, value) in variables.items()
    }
    lengths = {dim: n for dims, value in arrays.values() for dim, n in zip(dims, value.shape, strict=True)}
    coords = {dim: labels if dim == "prompt" else np.arange(n) for dim, n in lengths.items()}
    return xarray.Dataset(arrays, coords=coords)


def _printable(texts: Array) -> Array:
    """Replace characters that HDF5 cannot hold: NUL and lone surrogates."""
    clean = np.empty_like(texts)
    for index, text in np.ndenumerate(texts):
        clean[index] = text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    return clean
