r"""Metropolis-Hastings on suffixes as a kernel of Pyro's own MCMC.

    mcmc = pyro.infer.MCMC(SuffixKernel(model), num_samples=500, warmup_steps=200)
    mcmc.run(prompts)
    mcmc.get_samples()["completion"]      # (draw, *batch, token), int64

A step is a sweep of moves over all latents: new suffixes of completions, redraws of other discrete latents from the
prior, and for continuous latents either random walks or one step of NUTS conditional on all discrete latents. This is
Metropolis within Gibbs, each block of which leaves the posterior invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pyro import poutine
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from bayeslm.inference.program import (
    Assign,
    Particles,
    PolicyGuide,
    Program,
    assign_values,
    check_evidence,
    draw,
    inspect,
    run_particles,
    score_values,
    to_numpy,
)
from bayeslm.models.lm import LanguageModel, differentiating
from bayeslm.validation import Count, Positive, Within, validated

from .chains import Tally, latent_moves, sweep
from .ensemble import num_candidates
from .moves import Move, RandomWalk
from .potential import Potential, ScoreOnce, Unconstrained
from .tempering import Replicas


@validated
class SuffixKernel(MCMCKernel):
    """A kernel for `pyro.infer.MCMC`: a step is a sweep over the latents of a program, completions by their suffixes.

    Each prompt that is a posterior of its own accepts or rejects on its own (NUTS moves all prompts together). Step
    sizes and the mass matrix of NUTS adapt during the warm-up only. A chain starts from a draw of importance sampling,
    or at ``initial_params``. These are values of the sites themselves (token ids, positive scales), not mapped to real
    numbers, and so are the values that a ``hook_fn`` gets.

    Pyro's `MCMC.summary` and `MCMC.diagnostics` compute means, which token ids do not have: restrict them to the other
    latents by ``save_params``, or use `bayeslm.inference.MCMC`, whose posterior has diagnostics of completions too.

    :param model: a Pyro program.
    :param proposal: a policy (trained by `SVI`) that proposes suffixes of completions; None for the prior.
    :param num_candidates: the number of suffixes that a step proposes at once; None by the device, see
        `markov.num_candidates`.
    :param continuous: how continuous latents move, "random-walk" or "nuts".
    :param step_size: the initial step size of random walks, see `RandomWalk`; NUTS finds its own.
    :param initial_particles: the number of draws of the prior, or of the proposal, from which a chain starts.
    :param target_accept: the mean acceptance to which NUTS adapts its step size.
    :param max_tree_depth: trajectories of NUTS have at most 2 ** max_tree_depth steps.
    :raises ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        proposal: LanguageModel | None = None,
        num_candidates: Count | None = None,
        continuous: Literal["random-walk", "nuts"] = "random-walk",
        step_size: Positive = 1.0,
        initial_particles: Count = 256,
        target_accept: Annotated[float, Within("(0, 1)")] = 0.8,
        max_tree_depth: Count = 10,
    ) -> None:
        self.model = model
        self.proposal = proposal
        self.num_candidates = num_candidates
        self.continuous = continuous
        self.step_size = step_size
        self.initial_particles = initial_particles
        self.target_accept = target_accept
        self.max_tree_depth = max_tree_depth
        self.transforms: dict[str, Transform] | None = None  # for Pyro's MCMC; set by `setup`
        self._initial_params: dict[str, Tensor] | None = None

    @differentiating()
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Inspect ``model(*args, **kwargs)`` and start a chain.

        :param warmup_steps: the number of steps that adapt.
        :raises ProgramError: if a latent is masked, or a term of the log-joint is NaN or +inf.
        :raises EvidenceError: if no starting point has positive probability.
        """
        self._program = program = inspect(self.model, *args, **kwargs)
        self._latents = [site.name for site in program.latents]
        self.transforms = {site.name: _RestoreDtype(site.value.dtype) for site in program.latents}
        suffixes = self.num_candidates or num_candidates(program, 1)
        moves = latent_moves(program, policy=self.proposal, num_candidates=suffixes, step_size=self.step_size)
        by_nuts = self.continuous == "nuts"
        self._moves: list[Move] = [move for move in moves if not (by_nuts and isinstance(move, RandomWalk))]
        self._warmup, self._step, self._tally = warmup_steps, 0, Tally()
        self._params: dict[str, Tensor] = {}
        state = self._start() if self._initial_params is None else self._at(self._initial_params)
        check_evidence(to_numpy(state.log_joint)[None], program)
        self._set(state)
        self._nuts = None
        if names := [move.site.name for move in moves if move not in self._moves]:
            self._nuts = _NUTSBlock(program, names, self._state, warmup_steps, self.target_accept, self.max_tree_depth)

    @differentiating()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state after ``params``, both (*batch, *event) by site."""
        if params is not self._params:  # not the state after this kernel's last step
            self._set(self._at(params))
        warm = self._step < self._warmup
        with torch.no_grad():
            state = sweep(self._moves, self._state, tally=None if warm else self._tally, adapt=warm)
        self._set(state if self._nuts is None else self._nuts(state))
        self._step += 1
        return self._params

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return self._params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    @property
    def step_sizes(self) -> dict[str, Tensor]:
        """Step sizes of random walks, (1, prompt) by site, and of "NUTS"."""
        sizes = {move.site.name: move.step_size for move in self._moves if isinstance(move, RandomWalk)}
        return sizes | ({} if self._nuts is None else {"NUTS": torch.tensor(self._nuts.step_size)})

    def logging(self) -> dict[str, str]:
        """Return the acceptance of each site since the warm-up, for Pyro's progress bar."""
        rates = self._tally.stats()
        by_site = {f"acc. {move.site.name}": rates.get(f"acceptance_{move.site.name}") for move in self._moves}
        shown = {name: f"{rate.mean():.3f}" for name, rate in by_site.items() if rate is not None}
        return shown | ({} if self._nuts is None else self._nuts.logging())

    def diagnostics(self) -> dict[str, Any]:
        """Return the figures of `Tally.stats` since the warm-up, and the ``divergences`` of NUTS."""
        return self._tally.stats() | ({} if self._nuts is None else self._nuts.diagnostics())

    def cleanup(self) -> None:
        self._initial_params = None

    def _set(self, state: Particles) -> None:
        self._state = state
        self._params = {name: _at_least_float32(state.values[name][0]) for name in self._latents}

    def _at(self, params: dict[str, Tensor]) -> Particles:
        """Return the program run and scored at ``params``."""
        values = {name: params[name].to(self._program.sites[name].value)[None] for name in self._latents}
        return score_values(self._program, values)

    def _start(self) -> Particles:
        """Return a draw of importance sampling."""
        program = self._program
        guide = None if self.proposal is None else PolicyGuide(program, self.proposal)
        initial, _ = draw(program, guide, self.initial_particles)
        check_evidence(to_numpy(initial.log_weights)[None], program)  # before the weights choose one
        return Replicas(program, 1, 1).start(initial)


class _NUTSBlock:
    """A step of Pyro's NUTS in the continuous latents, conditional on all others.

    The others, and so the density, have changed since its last step: what NUTS has cached of the density is dropped.
    """

    def __init__(
        self, program: Program, names: list[str], state: Particles, warmup: int, target_accept: float, depth: int
    ) -> None:
        self._program = program
        self._names = names
        self._score_once = ScoreOnce(program)
        self._kernel = PyroNUTS(potential_fn=self._potential, target_accept_prob=target_accept, max_tree_depth=depth)
        self._kernel.initial_params = self._condition(state)
        self._kernel.setup(warmup)

    def __call__(self, state: Particles) -> Particles:
        z = self._condition(state)
        self._kernel.clear_cache()
        z = self._kernel.sample(z)
        at = {name: self._program.under_plate(name, x.detach()[None]) for name, x in z.items()}
        others = {name: value for name, value in state.values.items() if name not in self._names}
        with assign_values(self._program, others, state.token_log_prob), Assign(Unconstrained(at).assignments()):
            return run_particles(self._program, None, 1)

    def _condition(self, state: Particles) -> dict[str, Tensor]:
        """Condition the potential on the other latents of a state; return its continuous latents as real numbers."""
        values = {site.name: state.values[site.name][0] for site in self._program.latents}
        with torch.no_grad(), poutine.block(), _RecordUnconstrained(self._names) as record:
            poutine.condition(self._program.model, values)(*self._program.args, **self._program.kwargs)
        others = {name: value for name, value in values.items() if name not in self._names}
        self._conditioned = replace(self._program, model=poutine.condition(self._program.model, others))
        return record.z

    def _potential(self, z: dict[str, Tensor]) -> Tensor:
        return Potential(self._conditioned, self._score_once)(z)

    def logging(self) -> dict[str, str]:
        return dict(self._kernel.logging())

    def diagnostics(self) -> dict[str, Any]:
        return {"divergences": self._kernel.diagnostics()["divergences"]}

    @property
    def step_size(self) -> float:
        return float(self._kernel.step_size)


class _RecordUnconstrained(Messenger):
    """Record the real numbers ``z`` by site, from which bijections onto the supports give the sites' values."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.z: dict[str, Tensor] = {}
        self._names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            self.z[msg["name"]] = biject_to(msg["fn"].support).inv(msg["value"])


class _RestoreDtype(Transform):
    """The transform whose inverse restores a site's dtype: Pyro's MCMC keeps samples of all sites in one tensor."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def _call(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        return y.to(self._dtype)


def _at_least_float32(value: Tensor) -> Tensor:
    """Convert half precisions to float32, as token ids in the same tensor must stay exact."""
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value
