r"""How far a step moves a guide: KL(q_old || q_new), from the conditional distributions at particles.

By the chain rule the KL of a guide of sites x_1, x_2, ... is a sum over them,

    KL(q || q') = \sum_k E_q[ KL( q(x_k | x_{<k}) || q'(x_k | x_{<k}) ) ]

and of a completion the same over its tokens. The expectation is the mean over particles, which is exact for draws of q
and an approximation for those of another distribution. The inner KL is exact: of a completion's token from the complete
next-token distributions, of another site in closed form. Where there is none, the particle's own value estimates it by
exp(d) - 1 - d, d = log q' - log q, which is unbiased for draws of q and not negative (Schulman 2020,
http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from bayeslm.inference.program import Particles, Program, in_prompts, ranks, sample_sites
from bayeslm.models.lm import Autoregressive

from .auto_policy import AutoPolicy
from .sources import guide_trace


class Movement:
    """The distributions of a guide at some particles, to compare with those after a step.

    Each process of a run has some of its own particles; the KL is the mean over the processes.

    :param program: the program of the particles' prompts.
    :param guide: before the step.
    :param particles: their values; auxiliary ones included.
    """

    def __init__(self, program: Program, guide: Callable[..., Any], particles: Particles) -> None:
        self._program, self._guide, self._particles = program, guide, particles
        # copies: the parameters of a distribution may be the guide's own, which the step changes in place
        self._before = {
            name: (node if isinstance(node["fn"], Autoregressive) else node | {"fn": deepcopy(node["fn"])}, scores)
            for name, (node, scores) in self._distributions(self._nodes()).items()
        }

    def kl(self) -> float:
        """Return KL(q_old || q) of the guide now, in nats, the mean over particles and prompts."""
        n, total = len(self._particles), torch.zeros(())
        after = self._distributions(self._nodes_after())
        for name, (node, old) in self._before.items():
            kl = _kl(node, old, *after[name])
            total = total + self._program.pooled(self._program.terms(kl, n, in_prompts(node)))
        kl = ranks().total(total.detach().mean()) / ranks().size  # of all: they must not shorten a step differently
        return float(kl.clamp_min(0.0))  # rounding can make a tiny one negative

    @torch.no_grad()
    def _nodes(self) -> dict[str, Any]:
        """Return the nodes of the guide's sites at the particles."""
        trace, _ = guide_trace(self._program, self._guide, self._particles)
        return dict(sample_sites(trace))

    def _nodes_after(self) -> dict[str, Any]:
        """Return the nodes of the guide as it is now.

        Where it has texts alone, given values lead to distributions that change with their language models, and with
        nothing else: there the guide need not run again, which in a small network takes as long as a pass.
        """
        nodes = {name: node for name, (node, _) in self._before.items()}
        texts_alone = all(isinstance(node["fn"], Autoregressive) for node in nodes.values())
        if texts_alone and type(self._guide) is AutoPolicy and not self._program.has_params:
            return nodes
        return self._nodes()

    @torch.no_grad()
    def _distributions(self, nodes: dict[str, Any]) -> dict[str, tuple[Any, Tensor]]:
        """Return each site's node, and its next-token distributions or its log-probability at the particles."""

        def scores(fn: Any, value: Tensor) -> Tensor:
            found: Tensor = (fn.next_token_log_prob if isinstance(fn, Autoregressive) else fn.log_prob)(value)
            return found

        return {name: (node, scores(node["fn"], node["value"])) for name, node in nodes.items()}


def _kl(before: Any, old: Tensor, after: Any, new: Tensor) -> Tensor:
    """Return the KL of one site's distribution before to after, of the shape of its log-probability."""
    fn = before["fn"]
    if isinstance(fn, Autoregressive):
        each = (old.exp() * (old - new)).masked_fill(old == -torch.inf, 0.0).sum(-1)
        kl = each.masked_fill(~fn.vocabulary.is_live(before["value"]), 0.0).sum(-1)
    else:
        try:
            kl = kl_divergence(fn, after["fn"])
        except NotImplementedError:
            difference = new - old
            kl = difference.expm1() - difference
    return scale_and_mask(kl, before["scale"], before["mask"])
