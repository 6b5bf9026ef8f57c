"""Callbacks of a training: they inspect its steps, may stop it, and may move the inverse temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bayeslm.inference.program import Particles, seeded
from bayeslm.validation import Positive, validated

from .state import EMPTY

Memory = Mapping[str, Any]
"""What a callback remembers: tensors by name; anything, if the callback has no identity."""


@dataclass(frozen=True)
class StepRecord:
    r"""A training after one of its steps, or before the first.

    :param step: steps done.
    :param num_steps: the most that there will be; None if the run's `Budget` does not limit them.
    :param chain: the index of the chain.
    :param is_last: whether this is the last step: of ``num_steps``, or since an earlier callback stops the chain.
    :param policy: the language model that is trained; None if the guide has no attribute ``policy``.
    :param inverse_temperature: \gamma of this step; before the first, of the first.
    :param share: of the budget that is used, in [0, 1].
    :param history: figures of all steps by name, an array (prompt,) or () a step, under the names of `SVI`'s ``stats``.
    :param figures: of this step: means over prompts, ``learning_rate`` and ``samples_per_second``. Empty at step 0.
    :param evaluations: what earlier callbacks have evaluated at this step, see `Reply`.
    :param particles: of this step, if the objective keeps them.
    :param texts: returns rows of this step: a prompt, a completion of it, and its log-likelihood r / beta.
    """

    step: int
    num_steps: int | None
    chain: int
    is_last: bool
    policy: Any
    inverse_temperature: float
    share: float = 0.0
    history: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict, repr=False)
    figures: Mapping[str, float] = field(default_factory=dict)
    evaluations: Mapping[str, np.ndarray] = field(default_factory=dict)
    particles: Particles | None = field(default=None, repr=False)
    texts: Callable[[], list[tuple[str, str, float]]] = field(default=list, repr=False)


@validated
@dataclass(frozen=True)
class Reply:
    r"""What a callback asks of the training.

    :param stop: whether the chain ends here.
    :param inverse_temperature: \gamma of the next step; None leaves it.
    :param evaluations: arrays by name, which become ``stats`` (chain, evaluation, ...), and which callbacks after this
        one get in their record.
    :param state: what the callback gets at its next call, and after a checkpoint is resumed; None leaves it.
    """

    stop: bool = False
    inverse_temperature: Positive | None = None
    evaluations: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: Memory | None = None


class Callback:
    """The protocol of callbacks: subclasses override the methods that they need.

    A callback holds settings alone; what it remembers is a state, which the run holds, and saves in its checkpoints if
    the callback has an `identity`. Random numbers that it draws do not change the training's.
    """

    needs_num_steps = False  # whether what it replies depends on the number of steps that there will be

    def start(self, record: StepRecord, state: Memory) -> Reply | None:
        """Called once a chain: before its first step, or, with ``record.step`` above 0, where it is resumed."""

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        """Called after each step."""

    def end(self, record: StepRecord, state: Memory) -> Reply | None:
        """Called after the last step, or where Ctrl-C has ended the chain; not after an error."""

    def identity(self) -> Mapping[str, Any] | None:
        """Return the settings on which results depend, for checkpoints; None if no result depends on the callback."""
        return vars(self)


@dataclass(frozen=True)
class _Function(Callback):
    """A plain function: called before the first step and after each."""

    function: Callable[[StepRecord], Reply | None]

    def start(self, record: StepRecord, state: Memory) -> Reply | None:
        return self.function(record) if record.step == 0 else None

    def step(self, record: StepRecord, state: Memory) -> Reply | None:
        return self.function(record)

    def identity(self) -> None:
        return None


class Callbacks:
    """The callbacks of one chain with their states.

    :param callbacks: called in this order, so what stops a chain is best placed before what evaluates or logs it.
    """

    def __init__(self, callbacks: Sequence[Callback | Callable[[StepRecord], Reply | None]]) -> None:
        self._callbacks = [x if isinstance(x, Callback) else _Function(x) for x in callbacks]
        # those that identify a run keep their states in its checkpoints, in this order
        self._kept = [i for i, callback in enumerate(self._callbacks) if callback.identity() is not None]
        self._states: list[Memory] = [EMPTY for _ in self._callbacks]

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def call(self, when: str, record: StepRecord) -> tuple[StepRecord, float]:
        """Call the method ``when`` of each; return the record after all of them and the next inverse temperature."""
        gamma = record.inverse_temperature
        for i, callback in enumerate(self._callbacks):
            with seeded(record.step):
                reply = getattr(callback, when)(record, self._states[i])
            if not isinstance(reply, Reply):
                continue
            if reply.state is not None:
                self._states[i] = reply.state
            gamma = gamma if reply.inverse_temperature is None else reply.inverse_temperature
            evaluations = {**record.evaluations, **reply.evaluations}
            record = replace(record, is_last=record.is_last or reply.stop, evaluations=evaluations)
        return record, gamma

    def state(self) -> Memory:
        """Return the states as one, for a checkpoint."""
        return {f"{j}.{name}": x for j, i in enumerate(self._kept) for name, x in self._states[i].items()}

    def restore(self, state: Memory) -> None:
        """Put back what `state` returned."""
        for j, i in enumerate(self._kept):
            own = f"{j}."
            self._states[i] = {name.removeprefix(own): x for name, x in state.items() if name.startswith(own)}
