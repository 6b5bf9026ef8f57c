"""What the runs of all engines share: their beginning, time and usage, Ctrl-C and errors, batches, processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from pyro.poutine import runtime

from bayeslm.models.lm import Usage, count_usage, differentiating, drawing_by_samplers, exclusive, remembering
from bayeslm.posterior import Posterior
from bayeslm.progress import track
from bayeslm.validation import validated
from bayeslm.visible import message_of

from .agreement import check_together
from .handlers import seeded
from .particles import Particles, gathered, run_particles
from .program import Program
from .ranks import ALONE, Ranks, ranks, together


@runtime_checkable
class Engine(Protocol):
    """An engine of inference."""

    def run(self, model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Posterior:
        """Infer the posterior of ``model(*args, **kwargs)``."""


# -- time and usage -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Measure the seconds of its block and count the networks' work in it: the start of every engine's ``stats``.

    :param together: the processes among which the run is divided, whose counts are added up.
    """

    def __init__(self, together: Ranks = ALONE) -> None:
        self.ranks = together

    def __enter__(self) -> Stopwatch:
        self._counting = count_usage()
        self.usage = self._counting.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counting.__exit__(None, None, None)

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def check_together(self, program: Program, engine: Any, *but: str, **divided: int) -> None:
        """Check at the start that all processes do the same, see `agreement.check_together`."""
        if self.ranks.size > 1:
            check_together(self.ranks, program, engine, *but, **divided)

    def snapshot(self) -> dict[str, Any]:
        """The counts so far, as numbers, for `resume`."""
        return {"seconds": self.seconds()} | self.usage.state_dict()

    def resume(self, seconds: float, **numbers: Any) -> None:
        """Count on from a `snapshot`: the work of a run that is resumed."""
        self._start = time.perf_counter() - seconds
        self.usage.load_state_dict(numbers)

    def stats(self) -> dict[str, Any]:
        """Return ``seconds``, ``tokens``, ``model_calls``, and ``mismatch`` (the largest, the mean a token) if any.

        Where a sampler drew: ``sampler_draws``, their number; ``sampler_difference``, the largest and the mean
        |log p - log s| of a token; ``sampler_ess``, the share of effective draws that the difference leaves; and
        ``sampler_stale``, the number of draws by older weights, if any.

        Of a run that several processes do together, the sums of their counts, and ``processes``, their number.
        """
        usage = self.usage
        if self.ranks.size > 1:
            usage = Usage.total([message.value for message in self.ranks.exchange(usage.state_dict())])
        stats: dict[str, Any] = {"seconds": self.seconds(), "tokens": usage.tokens, "model_calls": usage.model_calls}
        stats |= {} if usage.mismatch is None else {"mismatch": list(usage.mismatch)}
        stats |= usage.drawn.stats()
        return stats if self.ranks.size == 1 else stats | {"processes": self.ranks.size}


# -- the beginning ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(seed: int | None, *, divided: bool = False, sampled: bool = False) -> Iterator[Stopwatch]:
    """Begin a run: the same wherever it is called.

    Other threads wait for their turn. Gradients are recorded, whatever the caller has turned off. A run inside another
    one (in its reward) does not see the handlers of that program. Prompts are encoded once a run. Several processes run
    it together, see `together`.

    :param seed: see `seeded`.
    :param divided: whether the engine divides its work among them.
    :param sampled: whether completions may come from samplers (`bayeslm.models.samplers`): for engines that need draws
        with their density alone. For others language models draw themselves.
    :returns: the stopwatch of the run.
    """
    with (
        exclusive(),
        remembering(),
        _handlers_of_caller(),
        differentiating(),
        drawing_by_samplers(sampled),
        together(seed, divided) as (processes, own),
        seeded(own),
        Stopwatch(processes) as watch,
    ):
        yield watch


_at_start: ContextVar[tuple[int, list[str | None]] | None] = ContextVar("bayeslm_handlers_at_start", default=None)


@contextlib.contextmanager
def _handlers_of_caller() -> Iterator[None]:
    """Hide the handlers and plates of the program of an enclosing run; those around that run stay."""
    handlers, plates = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
    outer = _at_start.get()
    size, dims = (len(handlers), list(plates)) if outer is None else outer
    hidden, hidden_plates = handlers[size:], list(plates)
    handlers[size:], plates[:] = [], dims
    _at_start.set((size, dims))
    try:
        yield
    finally:
        handlers[size:], plates[:] = hidden, hidden_plates
        _at_start.set(outer)


# -- Ctrl-C and errors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoFar:
    """The results of a run that did not end.

    :param particles: the particles drawn or moved until then.
    :param policies: of `SVI`, the trained language models, one a chain (None of a chain whose guide has none).
    :param step: of `SVI`, the number of finished steps of the last chain.
    :param checkpoint: of `SVI`, the folder of the last checkpoint.
    """

    particles: Particles | None = None
    policies: tuple[Any, ...] = ()
    step: int | None = None
    checkpoint: str | None = None

    @property
    def policy(self) -> Any:
        """The last chain's policy, or None."""
        return self.policies[-1] if self.policies else None

    def __str__(self) -> str:
        parts = []
        if self.particles is not None:
            parts.append(f"{len(self.particles)} particles")
        if any(policy is not None for policy in self.policies):
            parts.append("the trained policy" if len(self.policies) == 1 else f"{len(self.policies)} trained policies")
        if self.step is not None:
            parts.append(f"{self.step} steps")
        return ", ".join(parts) or "nothing"


class RunError(RuntimeError):
    """An error stopped a run that had results already: they are ``so_far``, and the error is the ``__cause__``."""

    def __init__(self, message: str, so_far: SoFar) -> None:
        super().__init__(message)
        self.so_far = so_far


@dataclass
class Interruption:
    """Whether Ctrl-C ended the block of `keeping`."""

    interrupted: bool = False


@contextlib.contextmanager
def keeping(so_far: Callable[[], SoFar | None], *, can_return: bool = True) -> Iterator[Interruption]:
    """Keep the results of a run that Ctrl-C or an error stops inside the block.

    Ctrl-C ends the block: the code after it returns the results, and the yielded object says ``interrupted``. An error
    is raised again as a `RunError` that carries the results. Where there are none yet, both pass unchanged.

    :param so_far: called when the block is stopped; returns the results, or None if there are none.
    :param can_return: False where the code after the block needs all of it: Ctrl-C is a `RunError` too.
    :raises RunError: on an error after the first results.
    """
    run = Interruption()
    try:
        yield run
    except (Exception, KeyboardInterrupt) as error:
        kept = so_far()
        if kept is not None and can_return and isinstance(error, KeyboardInterrupt):
            run.interrupted = True
            return
        inner = error.so_far if isinstance(error, RunError) else None
        if kept is None:
            raise
        if inner is not None and kept.particles is None:
            kept = replace(kept, particles=inner.particles)
        cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ is not None else error
        what = "interrupted" if isinstance(cause, KeyboardInterrupt) else f"{type(cause).__name__}: {message_of(cause)}"
        message = f"{what}\nThe run has {kept} so far: this error carries them as .so_far"
        raise RunError(message, kept) from cause


# -- batches of particles ---------------------------------------------------------------------------------------------


def draw(
    program: Program,
    guide: Callable[..., Any] | None,
    num_particles: int,
    *,
    batch_size: int | None = None,
    vectorize: bool = True,
    progress: bool = False,
    label: str = "particles",
    purpose: str = "",
) -> tuple[Particles, bool]:
    """Draw particles in batches of bounded memory, divided among the processes of the run.

    :param guide: the proposal; None proposes from the prior.
    :param batch_size: particles in one batch; None for as many as bounded memory allows.
    :param vectorize: see `run_particles`.
    :param progress: whether to show the progress, under ``label``, which a long run explains by ``purpose``.
    :returns: the particles of all processes, and whether Ctrl-C stopped the run before it had all of them.
    :raises RunError: if a later batch fails; it carries the particles drawn before.
    """
    own = ranks().share(num_particles)
    program = program.in_chunks_for(min(own, batch_size or own))
    size = batch_size or program.particles_a_run
    parts: list[Particles] = []

    def so_far() -> SoFar | None:
        return SoFar(particles=Particles.concatenate(parts)) if parts else None

    plan = f"{num_particles} draws {of_prompts(program)}{purpose and f', {purpose}'}"
    with track(label, own, progress, plan=plan, tokens=_tokens(program)) as report, keeping(so_far) as run:
        for start in range(0, own, size):
            n = min(size, own - start)
            parts.append(run_particles(program, guide, n, vectorize=vectorize))
            report(n)
    return gathered(parts, program.device), ranks().any(run.interrupted)


def _tokens(program: Program) -> int | None:
    """Return how many tokens a draw of all completions has at most; None without any."""
    of_run = int(sum(site.fn.batch_shape.numel() * site.fn.max_new_tokens for site in program.completions))
    return (of_run * (program.full_size if program.in_chunks else program.num_prompts) // program.num_prompts) or None


@validated
def of_prompts(program: Program) -> str:
    """Return, for the plan of a run, of how many prompts a step is."""
    if program.full_size == 1:
        return "of one prompt"
    some = f"{program.num_prompts} of " if program.num_prompts < program.full_size else ""
    return f"of each of {some}{program.full_size} prompts"
