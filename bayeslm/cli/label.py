"""The command `bayeslm label`: preferences between completions, from a person or a reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import INTERRUPTED, err_console, one_line_errors, out_console
from .inputs import language_model, load_reward, one_source, read_texts
from .journal import Journal
from .session import Session
from .terminal_judge import TerminalJudge

if TYPE_CHECKING:
    from bayeslm.inference.preferences import Elicitation, Pool

COMPLETIONS = 16  # the default for each prompt
FEATURES = ("sentence", "hidden")
NO_PROMPTS = 'no prompts: give at least one, as in bayeslm label "My dinner was", or --prompts FILE'


def label(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; may be left out if OUT exists.")] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="A file for the labels: JSON lines of prompt, chosen and rejected; an existing one is continued."
        ),
    ] = Path("labels.jsonl"),
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file of prompts: lines of text, or JSON(L), CSV or Parquet with "prompt".'),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="The language model that writes completions: smollm2, a folder, or a name on the Hugging Face hub."
        ),
    ] = "smollm2",
    completions: Annotated[
        int | None,
        typer.Option(
            help="Number of completions to draw for each prompt; prompts that have fewer get more. "
            f"Default: {COMPLETIONS} for new prompts."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion, in tokens.")] = 24,
    ask: Annotated[
        str,
        typer.Option(
            help="How to choose the next pair: information (to learn the preferences between any two), thompson or "
            "epsilon-greedy (to find good completions), or random."
        ),
    ] = "information",
    features: Annotated[
        str,
        typer.Option(help="Features of the learned reward: sentence (an embedding) or hidden (states of the model)."),
    ] = "sentence",
    components: Annotated[int, typer.Option(help="Most principal components of the features.")] = 16,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A reward that answers in your place: sentiment, ... or your own as package.module:function."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Noise of --judge, in the reward's units; 0 is none.")] = 0.1,
    timeout: Annotated[
        float | None, typer.Option(help="Time limit of an answer of --judge, in seconds. Default: none.")
    ] = None,
    number: Annotated[int | None, typer.Option(help="Stop at so many labels.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda if there is a GPU.")] = None,
    seed: Annotated[int, typer.Option(help="Makes the questions reproducible.")] = 0,
) -> None:
    """Label which of two completions is better; each next pair is chosen to be informative.

    Each answer is saved before the next question. Stop at any time with q or Ctrl-C, and repeat the command to resume.
    Two more files are kept next to OUT: the completions (.pool.jsonl) and the skipped pairs (.skipped.jsonl).

    For example:

      bayeslm label "My dinner at the restaurant was" "Our hotel room was" --out labels.jsonl

      bayeslm label --out labels.jsonl

      bayeslm label "The film was" --judge sentiment --number 50 --out simulated.jsonl
    """
    with one_line_errors():
        from bayeslm.posterior import DiagnosticsWarning

        if number is not None and number < 1:
            raise ValueError(f"--number must be at least 1, got {number}")
        if completions is not None and completions < 2:
            raise ValueError(f"--completions must be at least 2, got {completions}")
        if components < 1:
            raise ValueError(f"--components must be at least 1, got {components}")
        if features not in FEATURES:
            raise ValueError(f"--features {features} is unknown: choose one of {', '.join(FEATURES)}")
        if prompts is not None and prompts.resolve() == out.resolve():
            raise ValueError(f"--prompts and --out are both {out}: labels need a file of their own")
        if timeout is not None and judge is None:
            raise ValueError("--timeout is for --judge: a person at the terminal has no time limit")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"--timeout must be a positive number of seconds, got {timeout}")
        acquisition = _acquisition(ask)
        answering = TerminalJudge() if judge is None else _simulated_judge(judge, temperature, seed)
        source = one_source(prompt, prompts)
        new_prompts = [] if source is None else read_texts(source)
        if not (new_prompts or _paths(out)["pool"].exists()):
            raise ValueError(NO_PROMPTS)
        with _files(out) as files:
            lm = cache(lambda: language_model(model, device).packed())  # a resumed session may not need it
            pool = _pool(files["pool"], new_prompts, lm, completions, max_new_tokens, seed)
            elicitation = _elicitation(pool, acquisition, features, components, lm, seed, timeout)
            session = Session(files["labels"], files["skipped"], elicitation, pool)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DiagnosticsWarning)  # of every fit after an answer, amid the questions
                stopped = session.run(answering, number)
        session.show()
        out_console.print(f"{out}: {len(session.labels)} labels")
        if stopped:
            raise typer.Exit(INTERRUPTED)


def _paths(out: Path) -> dict[str, Path]:
    """Return the paths of the labels, the pool of completions, and the skipped pairs."""
    base = out.with_suffix("") if out.suffix == ".jsonl" else out
    return {"labels": out} | {name: base.with_name(f"{base.name}.{name}.jsonl") for name in ("pool", "skipped")}


@contextmanager
def _files(out: Path) -> Iterator[dict[str, Journal]]:
    """Open the journals of `_paths`."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(Journal(path)) for name, path in _paths(out).items()}
        for file in files.values():
            if file.removed is not None:
                err_console.print(f"{file.path}: removed an incomplete last line: {file.removed:.60}")
        yield files


def _pool(
    file: Journal, prompts: list[str], lm: Callable[[], Any], size: int | None, max_new_tokens: int, seed: int
) -> Pool:
    """Return the completions in the file, and draw more for prompts that have fewer than ``size`` draws, or none.

    The last row of a batch says how many completions were ``drawn`` for each prompt of the batch. Without that row the
    batch was interrupted, and is drawn again by the same seed; a pool drops repeated rows.
    """
    from bayeslm.inference.preferences import Pool

    rows = [(row.get("prompt"), row.get("completion")) for row in file.rows]
    if bad := [i for i, row in enumerate(rows) if not all(isinstance(text, str) for text in row)]:
        raise ValueError(f"{file.path}: row {bad[0] + 1} must have strings as prompt and completion")
    if not (rows or prompts):
        raise ValueError(NO_PROMPTS)
    drawn = _drawn(file.rows)
    least, size = size or 1, size or COMPLETIONS
    wanted = dict.fromkeys([*prompts, *(str(prompt) for prompt, _ in rows)])
    if new := [prompt for prompt in wanted if drawn.get(prompt, 0) < least]:
        with err_console.status(f"drawing {size} completions for each of {len(new)} prompts"):
            drawn_now = Pool.drawn(lm(), new, size, max_new_tokens=max_new_tokens, seed=seed)
        pairs = zip(drawn_now.prompts, drawn_now.completions, strict=True)
        batch: list[dict[str, Any]] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        batch[-1]["drawn"] = size
        for row in batch:
            file.append(row)
    return Pool([str(row["prompt"]) for row in file.rows], [str(row["completion"]) for row in file.rows])


def _drawn(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of completions drawn for each prompt, by the last row of each batch."""
    drawn: dict[str, int] = {}
    batch: set[str] = set()
    for row in rows:
        batch.add(row["prompt"])
        if isinstance(number := row.get("drawn"), int):
            drawn |= {prompt: max(number, drawn.get(prompt, 0)) for prompt in batch}
            batch.clear()
    return drawn


def _elicitation(
    pool: Pool,
    acquisition: Any,
    name: str,
    components: int,
    lm: Callable[[], Any],
    seed: int,
    timeout: float | None,
) -> Elicitation:
    from bayeslm.inference.preferences import Elicitation
    from bayeslm.models.preferences import BradleyTerry, LastHidden, SentenceEmbedding, Standardised

    with err_console.status("computing features of the completions"):
        embedding = SentenceEmbedding() if name == "sentence" else LastHidden(lm())
        standardised = Standardised(embedding, pool.prompts, pool.completions)
        size = min(components, standardised.axes.shape[1])
        features = Standardised(standardised.features, pool.prompts, pool.completions, size)
    return Elicitation(BradleyTerry(features, scale=4.0), acquisition, seed=seed, timeout=timeout)


def _acquisition(name: str) -> Any:
    from bayeslm.inference.control import EpsilonGreedy, Random, Thompson
    from bayeslm.inference.preferences import Duel, InformationGain

    makers: dict[str, Any] = {
        "information": InformationGain,
        "thompson": lambda: Duel(Thompson()),
        "epsilon-greedy": lambda: Duel(EpsilonGreedy(0.3)),
        "random": lambda: Duel(Random()),
    }
    if name not in makers:
        raise ValueError(f"--ask {name} is unknown: choose one of {', '.join(makers)}")
    return makers[name]()


def _simulated_judge(name: str, temperature: float, seed: int) -> Any:
    from bayeslm.models.preferences import SimulatedJudge

    return SimulatedJudge(load_reward(name), temperature, seed)
