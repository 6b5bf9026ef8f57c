"""A Pyro program as engines see it: its sites and the plate of prompts.

A program is inspected once, by a run without its networks: which sites are latent, which are inside the plate
``prompts``, and so whether its posterior factorises over prompts. `run` runs it for many particles at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bayeslm.models.lm import Autoregressive
from bayeslm.models.rewards import rehearsal, watching_seed
from bayeslm.validation import check_program, validated

from .errors import ProgramError
from .handlers import PROMPTS, Arbitrary, Minibatch, explained, seeded
from .sites import Site, check_site, sample_sites, site_of, vectorised_plates

FULL = 8  # particles that fit a batch, from which on one that is not full is of no account
MANY = 32  # batches of a run, where fewer fit
STEPS = "steps"  # a plate over the steps of a trajectory: the term of a step depends on nothing later


class Verified(set[str]):
    """The names of what has been checked of a program, and the number of its ``batches`` so far."""

    batches = 0

    def is_due(self) -> bool:
        """Count a batch of particles; return whether it is the first, the 4th, the 16th ..., which are checked."""
        self.batches += 1
        return self.batches.bit_count() == 1 and self.batches.bit_length() % 2 == 1


class Inspected(NamedTuple):
    """A run of a program with one particle, arbitrary tokens and arbitrary rewards.

    :param trace: without sites of subsamples.
    :param prompts: the minibatch (b,) of a subsampled plate, else None.
    """

    trace: Trace
    prompts: Tensor | None


@dataclass(frozen=True)
class Program:
    """An inspected model with its arguments.

    Where the plate of prompts is subsampled, a run has ``num_prompts`` of its ``full_size`` prompts: those of
    ``minibatch`` or, if that is None, all of them, one chunk after another (`chunks`).

    :param sites: in the order of the program.
    :param max_plate_nesting: the number of batch dimensions that its plates use.
    :param prompt_dim: the batch dimension of the plate of prompts, negative; None without that plate.
    :param num_prompts: the prompts of one run; 1 without that plate.
    :param shared: whether a latent or factor is outside the plate of prompts: all prompts are then one posterior, and
        the prompt axis of weights has length 1.
    :param device: where terms are summed, on whichever device a reward was computed.
    :param full_size: the size of the plate of prompts.
    :param has_params: whether it has parameters of its own, `pyro.param`.
    :param minibatch: indices (num_prompts,) of the prompts of this program, if they are a minibatch.
    :param whole: the program of all prompts, of which this one has a minibatch.
    :param verified: what has been checked of the program; its copies share it.
    :param inspected: the run in which it was inspected.
    :param first: the index of its first prompt among those of the program of which it is one of the `parts`, or which
        was `narrowed`.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sites: dict[str, Site]
    max_plate_nesting: int
    prompt_dim: int | None
    num_prompts: int
    shared: bool
    device: torch.device
    full_size: int
    has_params: bool
    minibatch: Tensor | None = None
    whole: Program | None = None
    verified: Verified = field(default_factory=Verified, repr=False, compare=False)
    inspected: Inspected | None = field(default=None, repr=False, compare=False)
    first: int = 0

    @property
    def latents(self) -> list[Site]:
        return [site for site in self.sites.values() if site.kind == "latent"]

    @property
    def completions(self) -> list[Site]:
        return [site for site in self.latents if site.is_completion]

    @property
    def rewards(self) -> list[tuple[str, Site]]:
        """The names of the rewards that are recorded, and their sites; in the plate of prompts, if posteriors are."""
        named = [(site.reward, site) for site in self.sites.values() if self.shared or site.in_prompts]
        return [(name, site) for name, site in named if name is not None]

    @property
    def stands_alone(self) -> bool:
        """Whether the model's own class says that its particles stand alone, as those of ready programs do."""
        return bool(vars(type(self.model)).get("stands_alone", False))

    @property
    def weight_prompts(self) -> int:
        """The length of the prompt axis of weights."""
        return 1 if self.shared else self.num_prompts

    @property
    def max_particles(self) -> int:
        """The most particles that one vectorised run holds in bounded memory."""
        rows = [fn.max_rows // max(1, fn.batch_shape.numel()) for fn in self._distributions_of_texts()]
        return max(1, min(rows, default=8192))

    @property
    def particles_a_run(self) -> int:
        """The particles of one run whose completions are drawn and scored in batches of bounded memory.

        As many as fit one batch; where that is few, as fill many batches, so that hardly any is not full.
        """
        fit = self.max_particles
        if fit >= FULL:
            return fit
        batches = [-(-MANY * fn.max_rows // fn.batch_shape.numel()) for fn in self._distributions_of_texts()]
        return max(1, min(batches))

    def _distributions_of_texts(self) -> list[Autoregressive]:
        """Return the distributions of all completions that one vectorised run draws, or one of each of the chunks."""
        runs = self.chunks if self.in_chunks else [self]
        return [site.fn for run in runs for site in run.completions]

    @property
    def in_chunks(self) -> bool:
        """Whether one run has fewer prompts than the program."""
        return self.minibatch is None and self.num_prompts < self.full_size

    @property
    def scale(self) -> float:
        """N / b: times this, a sum over a minibatch estimates the sum over all prompts."""
        return self.full_size / self.num_prompts

    def on(self, prompts: Tensor) -> Program:
        """Return the program of a minibatch (num_prompts,); its sites' ``fn`` and ``value`` are of other prompts."""
        return replace(self, minibatch=prompts, whole=self.whole or self)

    def pinned(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the model, or a guide, with the minibatch's prompts alone."""
        assert not self.in_chunks, "a run has a minibatch of the prompts: choose it with `on`"
        return fn if self.minibatch is None else Minibatch(self.minibatch)(fn)

    def in_chunks_for(self, num_particles: int) -> Program:
        """Return the program in `chunks` of as many prompts as so many particles of fill one pass.

        Itself, where these are fewer than it has, or where its plate of prompts has a number of its own.
        """
        fit = self.max_particles * self.num_prompts // max(1, num_particles)
        number = max(2, -(-self.full_size // max(1, fit)))
        size = -(-self.full_size // number)
        if not self.in_chunks or size <= self.num_prompts:
            return self
        try:
            first = _inspect(self.model, self.args, self.kwargs, torch.arange(size))
        except ProgramError:
            return self
        return replace(self, sites=first.sites, num_prompts=size, inspected=first.inspected)

    @cached_property
    def chunks(self) -> list[Program]:
        """Minibatches that cover all prompts, each inspected; the last may overlap with the one before."""
        starts = [*range(0, self.full_size - self.num_prompts, self.num_prompts), self.full_size - self.num_prompts]
        parts = [torch.arange(start, start + self.num_prompts) for start in starts]
        some = [_inspect(self.model, self.args, self.kwargs, prompts) for prompts in parts]
        return [replace(program, whole=self, verified=self.verified) for program in some]

    def parts(self, size: int) -> list[Program]:
        """Return programs of at most ``size`` prompts, which together have all of this one's.

        This one alone, where it cannot be divided: prompts have to be posteriors of their own, and the model to say by
        a method ``some_prompts`` what it is called with for some of them, as `TiltedLM` does.
        """
        divided = getattr(self.model, "some_prompts", None)
        if divided is None or self.shared or self.minibatch is not None or size >= self.num_prompts:
            return [self]
        found = []
        for prompts in torch.arange(self.num_prompts).tensor_split(-(-self.num_prompts // max(1, size))):
            args, kwargs = divided(prompts, *self.args, **self.kwargs)
            part = inspect(self.model, *args, **kwargs)
            found.append(replace(part, first=int(prompts[0]), verified=self.verified))
        return found

    def narrowed(self, first: int, size: int) -> Program:
        """Return the record of ``size`` prompts, from ``first``: sites in their shape. The model is that of all."""

        def some(site: Site) -> Site:
            fn = site.fn.narrowed(self.prompt_dim, first, size) if site.is_completion else site.fn
            value = site.value.expand(site.shape).narrow(self.prompt_axis(site.name) - 1, first, size)
            return replace(site, fn=fn, value=value, shape=tuple(value.shape))

        sites = {name: some(site) if site.in_prompts else site for name, site in self.sites.items()}
        return replace(self, sites=sites, num_prompts=size, full_size=size, first=self.first + first)

    def prompt_axis(self, name: str) -> int:
        """Return the axis of the prompts in a site's value (particle, *batch, *event)."""
        return 1 + self.sites[name].dims.index("prompt")

    def side_by_side(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Join one tensor of each of the `chunks`, or `parts`, along the axis of prompts."""
        overlap = sum(part.shape[axis] for part in parts) - self.full_size
        return torch.cat([*parts[:-1], parts[-1].narrow(axis, overlap, parts[-1].shape[axis] - overlap)], axis)

    def under_plate(self, name: str, value: Tensor) -> Tensor:
        """Return a site's value (particle, *batch, *event) with the particles in the outermost plate."""
        between = (1,) * (self.max_plate_nesting - self.sites[name].batch_dims)
        if not between:
            return value  # itself, whose copy on the CPU is known (`on_host`)
        return value.reshape(len(value), *between, *value.shape[1:])

    def terms(self, log_prob: Tensor, num_particles: int, in_prompts: bool) -> Tensor:
        """Return a site's log_prob, batch-shaped under the particle plate, as (particle, prompt).

        :param in_prompts: whether the site is inside the plate of prompts; else the prompt axis has length 1.
        """
        particles = (num_particles,) + (1,) * self.max_plate_nesting
        log_prob = log_prob.expand(broadcast_shape(log_prob.shape, particles))
        log_prob = log_prob.to(self.device)
        if self.prompt_dim is None or not in_prompts:
            return log_prob.reshape(num_particles, -1).sum(-1, keepdim=True)
        log_prob = log_prob.movedim(self.prompt_dim, 1)
        return log_prob.reshape(num_particles, log_prob.shape[1], -1).sum(-1)

    def pooled(self, term: Tensor) -> Tensor:
        """Return a term (particle, prompt) in the shape of weights: (particle, 1) where prompts are one posterior."""
        if self.shared:
            return term.sum(-1, keepdim=True)
        return term.expand(-1, self.num_prompts)

    def global_index(self, prompt: int) -> int:
        """Return the global index of a minibatch's prompt."""
        return self.first + prompt if self.minibatch is None else int(self.minibatch[prompt])

    def take(self, name: str, value: Tensor, index: Tensor) -> Tensor:
        """Return a site's value (particle, *batch, ...) at the particles that ``index`` (draw, prompt) names."""
        if self.shared:
            return value[index[:, 0].to(value.device)]
        return along(value, self.prompt_axis(name), index)


def inspect(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Program:
    """Run the program once, without its networks, and return it with its sites.

    :raises ProgramError: if it has no latent site, or one that engines would weigh wrongly: in a subsampled plate,
        under `poutine.scale`, or with a batch dimension that no plate declares.
    """
    program = inspect_or_reuse(None, model, args, kwargs)
    if program.num_prompts < program.full_size:
        raise ProgramError(
            f"the plate {PROMPTS!r} is subsampled, {program.num_prompts} prompts of {program.full_size}, and this "
            "engine needs all of them at once: leave out subsample_size (memory stays bounded without), or use SVI or "
            "ImportanceSampling"
        )
    return program


def _inspect(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], prompts: Tensor | None = None
) -> Program:
    """Inspect a program; of these prompts, or of the first ones, if its plate of prompts is subsampled."""
    if taken := sorted({"self", "fn"} & kwargs.keys()):  # arguments of Pyro's own wrappers of programs
        raise ProgramError(f"an argument or column is called {taken[0]!r}, which Pyro uses itself: rename it")
    if torch.get_default_dtype().itemsize < 4:
        raise ProgramError(
            f"torch's default dtype is {torch.get_default_dtype()}, in which rewards keep 3 digits: "
            "torch.set_default_dtype(torch.float32); networks keep the type of their weights"
        )
    minibatch = Minibatch(prompts)
    # seeded, so that every inspection of a program gives the same
    with (
        seeded(0),
        watching_seed() as seeds,
        torch.no_grad(),
        explained(),
        poutine.block(),
        rehearsal(calls=True),
        minibatch,
        Arbitrary(),
    ):
        trace = prune_subsample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    if seeds:
        raise ProgramError(
            "the program seeds torch's random numbers (pyro.set_rng_seed, torch.manual_seed), so that all its runs "
            "would draw the same: give the seed to the engine, and a torch.Generator to functions with own numbers"
        )
    sites: dict[str, Site] = {}
    sizes: dict[int, int] = {}
    for name, node in sample_sites(trace):
        sites[name] = site_of(name, node)
        check_site(sites[name], node)
        sizes |= {frame.dim: frame.size for frame in vectorised_plates(node) if frame.name == PROMPTS}
    if not any(site.kind == "latent" for site in sites.values()):
        raise ProgramError("the program has no latent site: nothing to infer (is every pyro.sample observed?)")
    dims = [dim for site in sites.values() for dim in site.plates]
    prompt_dim, num_prompts = next(iter(sizes.items()), (None, 1))
    random = [site for site in sites.values() if site.kind != "deterministic"]
    latents = [site for site in random if site.kind == "latent"]
    home = next((site for site in latents if site.is_completion), latents[0])
    shared = not all(site.in_prompts for site in random)
    full_size = None if prompt_dim is None else minibatch.full_size  # None: no subsample
    if shared and full_size is not None:
        outside = next(site.name for site in random if not site.in_prompts)
        raise ProgramError(
            f"site {outside!r} stands outside the plate {PROMPTS!r}, which makes all prompts one posterior: a "
            "subsample of them does not determine its weight. Leave out subsample_size, or put the site inside the "
            "plate"
        )
    if prompt_dim is None:
        _warn_of_another_plate(random)
    return Program(
        model=model,
        args=args,
        kwargs=kwargs,
        sites=sites,
        # a batch dim of size 1 needs no plate, and still keeps the particles one dim further out
        max_plate_nesting=max([-dim for dim in dims] + [site.batch_dims for site in random]),
        prompt_dim=prompt_dim,
        num_prompts=num_prompts,
        shared=shared,
        device=home.value.device,
        full_size=full_size or num_prompts,
        has_params=bool(trace.param_nodes),
        minibatch=minibatch.prompts if minibatch.fixed and full_size is not None else None,
        inspected=Inspected(trace, None if full_size is None else minibatch.prompts),
    )


def _warn_of_another_plate(sites: list[Site]) -> None:
    """Warn if a plate of another name than "prompts" holds all sites, and the completions of different prompts."""
    for site in sites:
        shared = set.intersection(*[set(other.plates.values()) for other in sites])
        if not (site.kind == "latent" and site.is_completion and shared):
            continue
        ids = site.fn.prompt_ids.expand(*site.shape[: site.batch_dims], -1)
        for dim, name in site.plates.items():
            axis = site.batch_dims + dim
            if name in shared and not torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids)):
                warnings.warn(
                    f"the plate around {site.name!r} is named {name!r}, so its {ids.shape[axis]} prompts are one "
                    f"posterior, whose draws are weighted all together: name it {PROMPTS!r} for a posterior of each",
                    stacklevel=2,
                )
                return


@validated
def inspect_or_reuse(
    program: Program | None, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    """Return ``program`` if it is of this model and these arguments; else inspect them.

    The plate of prompts may be subsampled. Arguments are those that the model reads in them by its method
    ``program_arguments``, if it has one (tables of prompts).

    :raises ProgramError: as `inspect`.
    :raises TypeError: if the model cannot be called.
    """
    check_program(model)
    if (read := getattr(model, "program_arguments", None)) is not None:
        args, kwargs = read(*args, **kwargs)
    if (
        program is not None
        and program.model is model
        and len(program.args) == len(args)
        and program.kwargs.keys() == kwargs.keys()
        and all(_same(a, b) for a, b in zip(program.args, args, strict=True))
        and all(_same(program.kwargs[name], kwargs[name]) for name in kwargs)
    ):
        return program
    return _inspect(model, args, kwargs)


def _same(a: Any, b: Any) -> bool:
    """Return whether arguments are one object, or equal texts and numbers (prompts are often listed at each step)."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, str | int | float) and a == b


def along(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """x (particle, ...) gathered by ``index`` (draw, prompt), prompts being ``axis`` of x."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    return x.gather(0, index.to(x.device).reshape(shape).expand(len(index), *x.shape[1:]))
