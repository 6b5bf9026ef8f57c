"""The error of a term of the log-joint that is NaN or +inf: the site, the particle, and its texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .errors import ProgramError
from .program import Program
from .sites import in_prompts, sample_sites, site_value


def invalid_term(program: Program, trace: Trace, terms: dict[str, Tensor], wrong: dict[str, Tensor]) -> ProgramError:
    """Return the error of the first term (particle, prompt), by site, that is ``wrong`` somewhere."""
    name = next(name for name, where in wrong.items() if where.any())
    term = terms[name]
    particle, prompt = (int(i) for i in wrong[name].nonzero()[0])
    node: Any = trace.nodes[name]
    return ProgramError(
        f"site {name!r} has log-probability {term[particle, prompt].item()} at particle {particle}"
        + (f", prompt {program.global_index(prompt)}" if program.full_size > 1 and in_prompts(node) else "")
        + (": a reward must be finite or -inf, and beta positive" if node["is_observed"] else "")
        + "".join(_texts(program, trace, len(term), particle, prompt))
    )


def _texts(program: Program, trace: Trace, num_particles: int, particle: int, prompt: int) -> Iterator[str]:
    """Return the texts of a particle's completions of a prompt, for an error."""
    for name, node in sample_sites(trace):
        site = program.sites.get(name)
        if site is None or not site.is_completion or not node["fn"].has_text:
            continue
        texts = node["fn"].decode(site_value(site, node["value"], num_particles)[particle]).reshape(-1)
        yield f"\n{name}: {texts[prompt if len(texts) > prompt else 0]!r}"
