"""Posteriors to write reports of: of every kind, with texts that want to break out of the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from bayeslm import Posterior

HOSTILE = [
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 2</script>",
    "</style></title></textarea><img src=x onerror='window.broken = 3'>",
    '" onmouseover="window.broken = 4" autofocus onfocus="window.broken = 5',
    "' onclick='window.broken = 6' x='",
    "<!--<script>",
    "]]><svg onload=window.broken=7>",
    "{{ 7 * 7 }} {% for x in y %} {# no #}",
    "javascript:window.broken=8",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "\\u003cscript\\u003e \\x3cscript\\x3e",
    "a\u202eb\u2066c\u200f",
    "nul \0 and bell \a and escape \x1b[31m",
    "lone \ud800 surrogates \udfff",
    "line\u2028and\u2029paragraph",
    "$x^2$ \\frac{1}{2} _underscore_",
    "https://example.org/x.png",
    "<base href=https://example.org/><link rel=stylesheet href=x.css><meta http-equiv=refresh content=0>",
    " leading and trailing ",
    "",
    "\n\n",
    "中文 العربية 👩‍🔬 é",
]


def hostile(kind: str = "weighted", seed: int = 0, **fields: Any) -> Posterior:
    """Return a posterior whose prompts, texts and names are hostile: 2 chains of as many draws as there are texts."""
    rng = np.random.default_rng(seed)
    draws, prompts = len(HOSTILE), 2
    texts = np.array(HOSTILE, dtype=object)[None, :, None].repeat(2, 0).repeat(prompts, 2)
    ids = np.arange(draws)[None, :, None, None].repeat(2, 0).repeat(prompts, 2).repeat(6, 3)
    ends = np.array([[min(t * 7, len(text)) for t in range(1, 6)] + [len(text)] for text in HOSTILE], dtype=np.int32)
    ratio = rng.normal(size=(2, draws, prompts, 6))
    reward = rng.normal(size=(2, draws, prompts))
    weighted = kind in ("weighted", "particles")
    log_weights = reward - ratio.sum(-1) if weighted else np.zeros(reward.shape)
    site = "<i>site</i>"
    settings: dict[str, Any] = {
        "samples": {site: ids},
        "log_weights": log_weights,
        "log_joint": reward - 5.0,
        "log_likelihood": {"<reward>": reward},
        "log_evidence": np.zeros(prompts),
        "log_evidence_stderr": np.full(prompts, 0.1),
        "kind": kind,
        "engine": "<b>Engine</b>",
        "dims": {site: ("prompt", "token")},
        "prompts": [f"{HOSTILE[1]} {HOSTILE[3]}", HOSTILE[11] + HOSTILE[12] + HOSTILE[13] + HOSTILE[7]],
        "rewards": {"<reward>": reward},
        "texts": {site: texts},
        "lengths": {site: np.full(reward.shape, 6)},
        "token_log_ratio": {site: ratio} if kind == "weighted" else {},
        "token_ends": {site: ends[None, :, None].repeat(2, 0).repeat(prompts, 2)} if kind == "weighted" else {},
        "prior_rewards": {"<reward>": rng.normal(size=(1, 30, prompts)) - 1.0},
        "stats": {"seconds": 2.0, "tokens": 100, "interrupted": True},
        "roots": np.zeros(reward.shape, dtype=int) if kind == "particles" else None,
    }
    curves = {name: rng.normal(size=(2, 40, prompts)).cumsum(1) for name in ("elbo", "kl", "log_likelihood")}
    if kind == "weighted":
        settings["stats"] |= curves | {"held_out_steps": np.array([10, 40]), "<x>_elbo": np.zeros((2, 2, prompts))}
    if kind == "particles":
        ancestors = rng.integers(draws, size=(2, 9, draws, prompts))
        settings["stats"] |= {"ancestors": ancestors, "ess_by_step": rng.uniform(1, draws, size=(2, 9, prompts))}
    return Posterior(**(settings | fields))


def many(rows: int) -> Posterior:
    """Return weighted draws of so many different texts of one prompt."""
    rng = np.random.default_rng(0)
    words = np.array(["good", "bad", "sunny", "rainy", "dinner", "weather"], dtype=object)
    texts = [f"number {i} is {' '.join(words[rng.integers(6, size=12)])}" for i in range(rows)]
    reward = rng.normal(size=(1, rows, 1))
    ends = np.array([[len(text) * (t + 1) // 24 for t in range(24)] for text in texts], dtype=np.int32)
    return Posterior(
        samples={"completion": np.arange(rows)[None, :, None, None].repeat(24, 3)},
        log_weights=reward,
        log_joint=reward,
        log_likelihood={"reward": reward},
        log_evidence=np.zeros(1),
        log_evidence_stderr=np.zeros(1),
        kind="weighted",
        engine="Toy",
        dims={"completion": ("prompt", "token")},
        prompts=["The day was"],
        rewards={"reward": reward},
        texts={"completion": np.array(texts, dtype=object)[None, :, None]},
        lengths={"completion": np.full((1, rows, 1), 24)},
        token_log_ratio={"completion": rng.normal(size=(1, rows, 1, 24))},
        token_ends={"completion": ends[None, :, None]},
    )
