"""Particles of a training step as texts: for logs, and for errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bayeslm.inference.program import Particles, Program


def texts_of(particles: Particles, program: Program, labels: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return the first particle's completions, as many of them as there are prompts: prompt, text, log-likelihood.

    :param labels: the names of the step's prompts.
    """
    rows: list[tuple[str, str, float]] = []
    log_likelihood = particles.total_log_likelihood[0].expand(len(labels)).tolist()
    for site in program.completions:
        value = particles.values.get(site.name)
        if value is not None and site.fn.has_text:
            texts = site.fn.decode(value[0]).reshape(-1)
            rows += zip(labels, texts, log_likelihood, strict=False)
    return rows


def describe_outlier(particles: Particles, program: Program, labels: Sequence[str]) -> str:
    """Describe the particle whose weight is farthest from the others', where numbers are likeliest to have gone wrong.

    :param labels: the names of the step's prompts.
    """
    ratio = particles.log_weights.float()
    away = (ratio - ratio.nanmedian(0).values).abs().nan_to_num(torch.inf, torch.inf)
    particle, prompt = divmod(int(away.argmax()), ratio.shape[1])
    lines = [f"log p + l - log q is {float(ratio[particle, prompt]):.6g} of particle {particle}, prompt {prompt}"]
    for site in program.completions:
        value = particles.values.get(site.name)
        if value is not None and site.fn.has_text:
            texts = site.fn.decode(value[particle]).reshape(-1)
            if len(texts) == len(labels):
                some = [prompt] if len(texts) == ratio.shape[1] else range(len(texts))
                lines += [f"{site.name} of {labels[i]!r}: {texts[i]!r}" for i in some]
            else:
                lines.append(f"{site.name}: {', '.join(map(repr, texts))}")
    return "\n".join(lines)
