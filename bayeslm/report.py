"""A report of posteriors: one HTML file for a colleague, which needs no network and runs nothing but its own script.

What a model has written cannot become part of the page: the template escapes every value, the table of texts is JSON
in which no element can end, and a Content-Security-Policy allows the one style sheet and the one script whose hashes it
has, and no address at all. Invisible characters, and those that change the order of others, are shown as escapes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bayeslm import advice, report_texts
from bayeslm import report_sections as sections
from bayeslm.files import write_file
from bayeslm.posterior_draws import PosteriorDraws
from bayeslm.processes import is_first
from bayeslm.summaries import next_steps, remarks
from bayeslm.validation import NonEmpty, validated
from bayeslm.version import __version__
from bayeslm.visible import visible

__all__ = ["render", "write_report"]


@validated
def write_report(
    posteriors: Annotated[Mapping[str, PosteriorDraws], NonEmpty],
    path: str | Path,
    *,
    title: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write a report of posteriors of one program and the same prompts, such as those of several engines.

    :param posteriors: by name.
    :param path: of the HTML file, which is replaced if there is one.
    :param title: of the report. Default: what was inferred, as far as the posteriors say.
    :param settings: of the run, by name, to be listed: the model, the reward, beta, ...
    :returns: the absolute path.
    :raises ImportError: without matplotlib.
    :raises ValueError: if the mapping is empty, or the prompts differ.
    :raises OSError: if the disk refuses; the file is then as it was before.
    """
    target = Path(path).absolute()
    if is_first():  # of several processes that run together
        write_file(target, render(posteriors, title=title, settings=settings))
    return target


@validated
def render(
    posteriors: Annotated[Mapping[str, PosteriorDraws], NonEmpty],
    *,
    title: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """Return the HTML of a report; parameters and errors are those of `write_report`."""
    first = next(iter(posteriors.values()))
    for name, posterior in posteriors.items():
        if posterior.prompts != first.prompts:
            raise ValueError(f"a report needs posteriors of the same prompts: those of {name!r} are others")
    program = first.stats.get("program")
    described = (dict(program) if isinstance(program, dict) else {}) | dict(settings or {})
    style, script = _read("report.css"), _read("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = _shown
    data = report_texts.table(posteriors)
    return environment.from_string(_read("report.html")).render(
        title=title or sections.title(posteriors, described),
        version=__version__,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(report_texts.as_json(data)),
        texts=data,
        measure=first.measure,
        facts=sections.facts(posteriors, described),
        settings={name: str(value) for name, value in described.items()},
        prompts=sections.prompts(first),
        remarks=remarks(posteriors),
        next_steps=next_steps(posteriors, lambda posterior, _: advice.in_words(posterior)),
        engines=sections.engines(posteriors),
        comparison=sections.comparison(posteriors),
        rewards=sections.rewards(posteriors),
        trainings=sections.trainings(posteriors),
        sizes=sections.sizes(posteriors),
        genealogies=sections.genealogies(posteriors),
        chains=sections.chains(posteriors),
    )


def _read(name: str) -> str:
    return resources.files("bayeslm").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _shown(value: Any) -> Any:
    """Return what the template writes in the place of a value: texts without invisible characters."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
