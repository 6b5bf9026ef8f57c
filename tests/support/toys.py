"""Posteriors in closed form, and a check of stated standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal, norm

from bayeslm import Posterior
from bayeslm.weights import log_evidence

Array = NDArray[Any]


@dataclass
class Gaussian:
    """x ~ N(0, 1), y = x + N(0, 1): posterior N(y/2, 1/2), evidence N(y; 0, 2), proposal N(mean, scale²)."""

    y: float = 1.0
    mean: float = 0.3
    scale: float = 0.9

    @property
    def log_z(self) -> float:
        return float(norm.logpdf(self.y, 0.0, np.sqrt(2.0)))

    @staticmethod
    def kl(mean: float, var: float, other_mean: float, other_var: float) -> float:
        return 0.5 * (np.log(other_var / var) + (var + (mean - other_mean) ** 2) / other_var - 1.0)

    @staticmethod
    def entropy(var: float) -> float:
        return float(0.5 * np.log(2 * np.pi * np.e * var))

    def posterior(self, seed: int, kind: str = "weighted", prompts: int = 200) -> Posterior:
        """Return 4 chains of 250 draws; every prompt is an independent replicate."""
        rng = np.random.default_rng(seed)
        shape = (4, 250, prompts)
        if kind == "weighted":
            x = rng.normal(self.mean, self.scale, shape)
        else:
            x = rng.normal(self.y / 2, np.sqrt(0.5), shape)
        likelihood = norm.logpdf(self.y, x, 1.0)
        joint = norm.logpdf(x) + likelihood
        weights = joint - norm.logpdf(x, self.mean, self.scale) if kind == "weighted" else np.zeros(shape)
        known = log_evidence(weights) if kind == "weighted" else (np.full(prompts, self.log_z), np.zeros(prompts))
        return Posterior(
            samples={"x": x},
            log_weights=weights,
            log_joint=joint,
            log_likelihood={"y": likelihood},
            log_evidence=known[0],
            log_evidence_stderr=known[1],
            kind=kind,
            engine="Toy",
            dims={"x": ("prompt",)},
            prompts=[f"prompt {i}" for i in range(prompts)],
            prior={"x": rng.normal(size=shape), "y": rng.normal(size=shape)},
        )


@dataclass
class RandomWalk:
    """x_t = x_{t−1} + N(0, 1), y_t = x_t + N(0, 1), t = 1 ... T, and the particle filter of it."""

    y: Array = field(default_factory=lambda: np.linspace(0.5, 2.0, 4))

    def __post_init__(self) -> None:
        steps = np.arange(1.0, len(self.y) + 1)
        prior, noise = np.minimum.outer(steps, steps), np.eye(len(self.y))
        self.log_z = float(multivariate_normal.logpdf(self.y, np.zeros(len(self.y)), prior + noise))
        self.covariance = np.linalg.inv(np.linalg.inv(prior) + noise)
        self.mean = self.covariance @ self.y
        self.entropy = float(np.linalg.slogdet(2 * np.pi * np.e * self.covariance)[1] / 2)
        squares = (self.y - self.mean) ** 2 + np.diag(self.covariance)
        self.kl_to_prior = float(np.sum(-0.5 * np.log(2 * np.pi) - 0.5 * squares)) - self.log_z

    def posterior(self, seed: int, prompts: int = 200, multinomial: bool = False) -> Posterior:
        """4 chains of 250 particles, resampled after all times but the last, by default systematically.

        Every prompt is an independent replicate.
        """
        rng = np.random.default_rng(seed)
        shape = (4, prompts, 250)
        path, weights, roots = np.zeros((*shape, 0)), np.zeros(shape), np.broadcast_to(np.arange(250), shape)
        for y in self.y:
            if path.shape[-1]:
                strata = (np.arange(250) + rng.random((4, prompts, 1))) / 250
                points = rng.random(shape) if multinomial else strata
                cumulative = np.cumsum(softmax(weights, axis=2), axis=2)
                cumulative /= cumulative[..., -1:]
                ancestors = np.empty(shape, dtype=int)
                for cell in np.ndindex(4, prompts):
                    ancestors[cell] = np.searchsorted(cumulative[cell], points[cell], side="right")
                path = np.take_along_axis(path, ancestors[..., None], axis=2)
                roots = np.take_along_axis(roots, ancestors, axis=2)
                weights = np.broadcast_to(logsumexp(weights, axis=2, keepdims=True) - np.log(250), shape)
            x = rng.normal(path[..., -1] if path.shape[-1] else 0.0, 1.0, shape)
            path = np.concatenate([path, x[..., None]], axis=3)
            weights = weights + norm.logpdf(y, x, 1.0)
        path, weights, roots = (np.swapaxes(values, 1, 2) for values in (path, weights, roots))
        likelihood = norm.logpdf(self.y, path, 1.0).sum(axis=3)
        evidence = log_evidence(weights, roots)
        return Posterior(
            samples={"x": path},
            log_weights=weights,
            log_joint=norm.logpdf(np.diff(path, axis=3, prepend=0.0)).sum(axis=3) + likelihood,
            log_likelihood={"y": likelihood},
            log_evidence=evidence[0],
            log_evidence_stderr=evidence[1],
            kind="particles",
            engine="Toy",
            dims={"x": ("prompt", "time")},
            prompts=[f"prompt {i}" for i in range(prompts)],
            roots=roots,
        )


PRIOR = np.array([0.4, 0.3, 0.2, 0.1])
REWARD = np.array([[0.0, 1.0, -1.0, 2.0], [0.5, -np.inf, 0.0, 1.0]])  # (prompt, value); one value violates a constraint
JOINT = np.log(PRIOR) + REWARD
LOG_Z = logsumexp(JOINT, axis=1)
TARGET = softmax(JOINT, axis=1)
WORDS = np.array(["no", "yes", "maybe", "sure"], dtype=object)


def discrete(index: Array, log_q: Array | None, kind: str, **fields: Any) -> Posterior:
    """Return a posterior over the four values above for two prompts; the completion is two tokens, (i, i + 1)."""
    prompts = np.arange(2)
    joint, reward = JOINT[prompts, index], REWARD[prompts, index]
    weights = np.zeros(index.shape) if log_q is None else joint - log_q
    evidence = log_evidence(weights) if kind == "weighted" else (LOG_Z.copy(), np.zeros(2))
    defaults: dict[str, Any] = {
        "samples": {"completion": np.stack([index, index + 1], axis=-1)},
        "rewards": {"reward": 0.1 * reward},
        "log_weights": weights,
        "log_joint": joint,
        "log_likelihood": {"reward": reward},
        "log_evidence": evidence[0],
        "log_evidence_stderr": evidence[1],
        "kind": kind,
        "engine": "Toy",
        "dims": {"completion": ("prompt", "token")},
        "prompts": ["Is it good?", "Is it bad?"],
        "texts": {"completion": WORDS[index]},
        "lengths": {"completion": 1 + index % 2},
        "prior": {"reward": np.full((2, 10, 2), 0.5)},
        "prior_rewards": {"reward": np.full((2, 10, 2), 0.05)},
        "observed": {"label": np.array([1.0, 0.0])},
        "stats": {"seconds": 2.0, "tokens": 100, "elbo": np.linspace(-2.0, 0.1, 40)},
    }
    return Posterior(**(defaults | fields))


def enumerated() -> Posterior:
    index = np.broadcast_to(np.arange(4)[:, None], (1, 4, 2)).copy()
    return discrete(index, np.full(index.shape, -np.log(4.0)), "enumerated")


def from_prior(seed: int, **fields: Any) -> Posterior:
    """Return 4 chains of 250 weighted draws from the prior."""
    index = np.random.default_rng(seed).choice(4, size=(4, 250, 2), p=PRIOR)
    return discrete(index, np.log(PRIOR)[index], **({"kind": "weighted"} | fields))


def shared() -> Posterior:
    """Return the enumerated posterior of a latent z in {0, 1} shared by three prompts, with reward z · (prompt + 1)."""
    z = np.array([[0.0, 1.0]])
    reward = z[..., None] * np.arange(1.0, 4.0)
    joint = np.log(0.5) + reward.sum(axis=2, keepdims=True)
    return Posterior(
        samples={"z": z},
        log_weights=joint + np.log(2.0),
        log_joint=joint,
        log_likelihood={"reward": reward},
        log_evidence=logsumexp(joint, axis=1).ravel(),
        log_evidence_stderr=np.zeros(1),
        kind="enumerated",
        engine="Toy",
        dims={"z": ()},
        prompts=["a", "b", "c"],
    )


def shared_weighted(seed: int = 0) -> Posterior:
    """Return a posterior of a latent theta shared by two prompts; a draw and its completions are resampled together."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(2, 50, 3))
    tokens = np.repeat(np.arange(100).reshape(2, 50, 1, 1), 2, axis=2) * np.ones(4, dtype=int)
    likelihood = theta[..., :2]
    weights = likelihood.sum(axis=2, keepdims=True)
    return Posterior(
        samples={"theta": theta, "completion": tokens},
        log_weights=weights,
        log_joint=weights - 1.0,
        log_likelihood={"reward": likelihood},
        log_evidence=np.zeros(1),
        log_evidence_stderr=np.zeros(1),
        kind="weighted",
        engine="Toy",
        dims={"theta": ("theta_dim_0",), "completion": ("prompt", "token")},
        prompts=["a", "b"],
        texts={"completion": tokens[..., 0].astype(str).astype(object)},
        lengths={"completion": tokens[..., 0]},
    )


def autoregression(rng: np.random.Generator, shape: tuple[int, ...], correlation: float = 0.6) -> Array:
    """Return stationary standard normal chains, (chain, draw, ...)."""
    x = rng.normal(size=shape)
    for step in range(1, shape[1]):
        x[:, step] = correlation * x[:, step - 1] + np.sqrt(1 - correlation**2) * x[:, step]
    return x


MAKERS: dict[str, Callable[[], Posterior]] = {
    "enumerated": enumerated,
    "weighted": lambda: from_prior(0),
    "shared latent": shared_weighted,
    "particles": lambda: RandomWalk().posterior(0, prompts=2),
    "markov": lambda: Gaussian().posterior(0, "markov", prompts=2),
}


def assert_calibrated(estimate: Array, stderr: Array, truth: float) -> None:
    """Assert that the z-scores of 200 replicates have mean 0 and sd 1.

    Their mean has sd 0.07 and their sd has sd 0.05, so bounds of 4.5 sd fail by chance in 1 of 70,000 calls;
    the bound on the mean leaves 0.1 more for the bias of order 1/N that ratios and logarithms have.
    """
    z = (estimate - truth) / stderr
    assert z.shape == (200,)
    assert abs(z.mean()) < 4.5 * 0.071 + 0.1, z.mean()
    assert abs(z.std() - 1.0) < 4.5 * 0.05, z.std()
