"""What to do about errors that cannot be believed, engine by engine, in the words of whoever reads it.

`reliability.problems` says what is wrong. Python's warnings name settings and classes, the command line its options,
and a report, which anybody may read, says it in words.
"""

from __future__ import annotations

from typing import NamedTuple

from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.validation import validated

__all__ = ["ADVICE", "Advice", "in_python", "in_words", "on_command_line"]


class Advice(NamedTuple):
    """What to do: in words, by the engine's settings, and by other engines."""

    words: str
    settings: tuple[str, ...] = ()
    """Of the engine, to be raised."""
    instead: str = ""
    """What to write in Python."""
    engine: str = ""
    """What ``--engine`` takes on the command line."""


_POLICY = "AdaptiveImportance().run(model, ...)"
ADVICE = {  # by engine; of others by kind
    "ImportanceSampling": Advice(
        "use more draws or a better proposal, such as a trained policy",
        ("num_particles",),
        f"propose from a policy: {_POLICY}, or ImportanceSampling(guide=SVI().run(model, ...).policy)",
        "adaptive",
    ),
    "AdaptiveImportance": Advice(
        "use more draws", ("num_particles", "num_steps"), "SMC(num_particles=1024)", "smc(num_particles=1024)"
    ),
    "Auto": Advice("use more draws or more time", ("num_particles", "max_seconds", "target_ess")),
    "SVI": Advice("use more draws or train the policy longer", ("num_samples", "num_steps"), _POLICY, "adaptive"),
    "Laplace": Advice("use more draws, or NUTS", ("num_samples",), "NUTS().run(model, ...)"),
    "SMC": Advice(
        "use more particles or chains, or a better twist or proposal",
        ("num_particles", "num_chains"),
        _POLICY,
        "adaptive",
    ),
    "AnnealedSMC": Advice(
        "use more particles or chains, a finer ladder or more sweeps",
        ("num_particles", "num_chains", "cess", "num_sweeps"),
    ),
    "ControlledSMC": Advice("use more particles or sweeps", ("num_particles", "num_sweeps")),
    "MCMC": Advice(
        "run more sweeps, or better moves (a policy, tempering)",
        ("num_samples", "warmup"),
        "MCMC(num_temperatures=4) for modes far apart",
        "mcmc(num_temperatures=4)",
    ),
    "NUTS": Advice("use more draws and a longer warmup", ("num_samples", "warmup", "target_accept")),
    "RejectionSampling": Advice("use more draws", ("num_samples", "max_proposals")),
    "BestOfN": Advice("use more draws", ("num_samples",)),
    "weighted": Advice("use more draws or a better proposal"),
    "particles": Advice("use more particles or chains"),
    "markov": Advice("run longer chains"),
    "exact": Advice("use more draws"),
    "enumerated": Advice("nothing, an enumeration has no error of sampling"),
    "uncorrected": Advice("use more draws"),
}


@validated
def in_words(posterior: PosteriorDraws) -> str:
    """Return what to do about a posterior's errors, for any reader."""
    return _of(posterior).words


@validated
def in_python(posterior: PosteriorDraws) -> str:
    """Return what to write next in Python."""
    advice = _of(posterior)
    return ", or ".join(filter(None, [_raised(advice), advice.instead])) or advice.words


@validated
def on_command_line(posterior: PosteriorDraws, name: str) -> str:
    """Return what to write next on the command line.

    :param name: of the engine there.
    """
    advice = _of(posterior)
    raised = f'{_raised(advice)} in --engine "{name}({advice.settings[0]}=...)"' if advice.settings else ""
    other = f'try --engine "{advice.engine}"' if advice.engine else ""
    return ", or ".join(filter(None, [raised, other])) or advice.words


def _of(posterior: PosteriorDraws) -> Advice:
    return ADVICE.get(posterior.engine, ADVICE[posterior.kind])


def _raised(advice: Advice) -> str:
    *others, last = advice.settings or ("",)
    return f"raise {', '.join(others)}{' or ' if others else ''}{last}" if last else ""
