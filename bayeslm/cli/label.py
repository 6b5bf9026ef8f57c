"""The command `bayeslm label`: teach a reward by saying which of two completions is better."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import INTERRUPTED, clear_errors, err_console, language_model, out_console, read_prompts
from .journal import Journal
from .terminal import PLAIN, Person, Quit, Undo, shown

if TYPE_CHECKING:
    from bayeslm.inference.preferences import Elicitation, Pool
    from bayeslm.models.preferences import Answer

RECENT = 20  # answers that a second share of foreseen ones is of
COMPLETIONS = 16  # of a prompt, where nothing else is said
FEATURES = ("sentence", "hidden")
NO_PROMPTS = 'no prompts: give one, as in bayeslm label "My dinner was", or --prompts FILE'


def label(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; none where OUT has some already.")] = None,
    out: Annotated[
        Path, typer.Option(help="JSON lines of prompt, chosen and rejected; where it exists, it is gone on with.")
    ] = Path("labels.jsonl"),
    prompts: Annotated[Path | None, typer.Option(help='A file of prompts: one a line, or JSONL with "prompt".')] = None,
    model: Annotated[
        str, typer.Option(help="Draws completions: smollm2, a folder, or a name on the Hugging Face hub.")
    ] = "smollm2",
    completions: Annotated[
        int | None,
        typer.Option(
            help=f"Draws for each prompt, among which pairs are chosen; of new prompts {COMPLETIONS} unless said. "
            "Where OUT has fewer, more are drawn."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest completion.")] = 24,
    ask: Annotated[
        str,
        typer.Option(
            help="Which pair: information (to know which of any two is better), thompson or epsilon-greedy (to find "
            "good ones), or random."
        ),
    ] = "information",
    features: Annotated[
        str, typer.Option(help="What the learned reward reads: sentence (an embedding) or hidden (of the model).")
    ] = "sentence",
    components: Annotated[int, typer.Option(help="Principal components of the features, at most.")] = 16,
    judge: Annotated[
        str | None,
        typer.Option(help="Let a reward answer: sentiment, ... or your own as package.module:function."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of that judge's noise, in the reward's units.")] = 0.1,
    number: Annotated[int | None, typer.Option(help="Stop when there are so many labels.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Reproduces the questions.")] = 0,
) -> None:
    """Say which of two completions is better; the next pair is the one whose answer tells most.

    Each answer is on the disk before the next question. Stop whenever you like, by q or Ctrl-C: the same call goes on.
    Beside OUT lie the completions (.pool.jsonl) and the pairs that were skipped (.skipped.jsonl).

    [bold]Examples[/bold]

      bayeslm label "My dinner at the restaurant was" "Our hotel room was" --out labels.jsonl

      bayeslm label --out labels.jsonl

      bayeslm label "The film was" --judge sentiment --number 50 --out simulated.jsonl
    """
    with clear_errors():
        if number is not None and number < 1:
            raise ValueError(f"--number must be at least 1, got {number}")
        if completions is not None and completions < 2:
            raise ValueError(f"--completions must be at least 2, got {completions}")
        if components < 1:
            raise ValueError(f"--components must be at least 1, got {components}")
        if features not in FEATURES:
            raise ValueError(f"--features {features} is none of {', '.join(FEATURES)}")
        if prompts is not None and prompts.resolve() == out.resolve():
            raise ValueError(f"--prompts and --out are both {out}: labels need a file of their own")
        acquisition = _acquisition(ask)
        answering = Person() if judge is None else _simulated(judge, temperature, seed)
        given = read_prompts(prompt or [], prompts)[0] if prompt or prompts else []
        if not (given or _paths(out)["pool"].exists()):
            raise ValueError(NO_PROMPTS)
        with _files(out) as files:
            lm = _Lazy(model, device)
            pool = _pool(files["pool"], given, lm, completions, max_new_tokens, seed)
            loop = _loop(pool, acquisition, features, components, lm, seed)
            session = Session(files["labels"], files["skipped"], loop, pool)
            stopped = session.run(answering, number)
        session.show()
        out_console.print(f"{out}: {len(session.labels)} labels", highlight=False)
        if stopped:
            raise typer.Exit(INTERRUPTED)


class Session:
    """Questions and answers, each of which is in a file before the next.

    :param labels: rows of prompt, chosen and rejected, with ``first_is_better``, how the two were shown, and
        ``probability``, how likely the answer was by what was known before.
    :param skipped: rows of prompt, first and second, and ``after`` how many labels it was.
    """

    def __init__(self, labels: Journal, skipped: Journal, loop: Elicitation, pool: Pool) -> None:
        from bayeslm.models.preferences import Comparisons

        self._labels, self._skipped = labels, skipped
        self._loop, self._pool = loop, pool
        self.answers: list[Answer] = []
        if labels.rows:
            data = Comparisons.from_jsonl(labels.path)  # says what is wrong with which line
            texts = zip(data.prompts, data.chosen, data.rejected, strict=True)
            self.answers = [_answer(row, *three) for row, three in zip(labels.rows, texts, strict=True)]
        for row in reversed(skipped.rows):  # the last first, so that the places of those before it stay
            self.answers.insert(row.get("after", 0), _skip(row))

    @property
    def labels(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.first_is_better is not None]

    def run(self, judge: Any, number: int | None) -> bool:
        """Ask until there are ``number`` labels, no pair is left, or the judge quits; whether by Ctrl-C.

        Whatever the judge raises, what was answered before is in the files.
        """
        try:
            while number is None or len(self.labels) < number:
                question = self._loop.ask(self._pool, self.answers)
                if question is None:
                    err_console.print(
                        "no pair is left: every two completions of a prompt were compared", style="yellow"
                    )
                    return False
                try:
                    self._keep(question.answered(judge(question.prompt, question.first, question.second)))
                except Undo:
                    self._undo()
                else:
                    if isinstance(judge, Person):
                        self.show()
        except Quit:
            return False
        except KeyboardInterrupt:
            return True
        return False

    def _keep(self, answer: Answer) -> None:
        if answer.first_is_better is None:
            row = {"prompt": answer.prompt, "first": answer.first, "second": answer.second}
            self._skipped.append(row | {"after": len(self.labels)})
        else:
            chosen, rejected = answer.first, answer.second
            if not answer.first_is_better:
                chosen, rejected = rejected, chosen
            row = {"prompt": answer.prompt, "chosen": chosen, "rejected": rejected}
            asked = {"first_is_better": answer.first_is_better, "probability": answer.probability}
            self._labels.append(row | asked)
        self.answers.append(answer)

    def _undo(self) -> None:
        if not self.answers:
            err_console.print("there is nothing to take back", style="yellow")
            return
        answer = self.answers.pop()
        skipped = answer.first_is_better is None
        (self._skipped if skipped else self._labels).pop()
        first, second = shown(answer.first, answer.second)
        said = "skipped" if skipped else "1 is better" if answer.first_is_better else "2 is better"
        out_console.print(f"taken back: {said}, of 1 {first} and 2 {second}", **PLAIN)

    def show(self) -> None:
        """How many answers were foreseen, and what is still uncertain."""
        labels = self.labels
        if not labels:
            return
        foreseen = [answer.foreseen for answer in labels]
        recent = foreseen[-RECENT:]
        surprisal = sum(answer.surprisal for answer in labels[-RECENT:]) / len(recent)
        out_console.print(
            f"{len(labels)} labels · foreseen {sum(foreseen)}"
            + (f", of the last {len(recent)}: {sum(recent)}" if len(labels) > RECENT else "")
            + f" · {surprisal:.2f} nats a label (a coin: 0.69) · uncertain {self._uncertainty():.0%}",
            style="dim",
            highlight=False,
        )

    def _uncertainty(self) -> float:
        """The standard deviation of rewards' differences within prompts, as a share of what the prior has."""
        return self._spread(self.answers) / self._prior_spread

    @cached_property
    def _prior_spread(self) -> float:
        return self._spread([])

    def _spread(self, answers: list[Answer]) -> float:
        weights = self._loop.weights(answers, self._pool.example)
        rewards = self._loop.model.reward(self._pool.prompts, self._pool.completions, weights)
        pairs = self._pool.pairs()
        return float((rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).var(0).mean().sqrt())


class _Lazy:
    """The language model, which a session that goes on may not need."""

    def __init__(self, name: str, device: str | None) -> None:
        self._of = name, device
        self._lm: Any = None

    def __call__(self) -> Any:
        if self._lm is None:
            self._lm = language_model(*self._of).packed()
        return self._lm


def _paths(out: Path) -> dict[str, Path]:
    """Of the labels, and of what lies beside them."""
    base = out.with_suffix("") if out.suffix == ".jsonl" else out
    return {"labels": out} | {name: base.with_name(f"{base.name}.{name}.jsonl") for name in ("pool", "skipped")}


@contextmanager
def _files(out: Path) -> Iterator[dict[str, Journal]]:
    """The journals of `_paths`."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(Journal(path)) for name, path in _paths(out).items()}
        for file in files.values():
            if file.mended is not None:
                err_console.print(
                    f"{file.path}: a last line that was torn is taken away: {file.mended:.60}", markup=False
                )
        yield files


def _pool(file: Journal, prompts: list[str], lm: _Lazy, size: int | None, max_new_tokens: int, seed: int) -> Pool:
    """The completions in the file, and new ones of prompts that it has none of, or fewer draws of than ``size``.

    What is drawn at once ends with a row that says how many were ``drawn`` of each prompt: without it, the prompts were
    broken off in the middle, and the same call draws the same again; a pool has no row twice.
    """
    from bayeslm.inference.preferences import Pool

    rows = [(row.get("prompt"), row.get("completion")) for row in file.rows]
    if bad := [i for i, row in enumerate(rows) if not all(isinstance(text, str) for text in row)]:
        raise ValueError(f"{file.path}: row {bad[0] + 1} needs strings for prompt and completion")
    if not (rows or prompts):
        raise ValueError(NO_PROMPTS)
    drawn = _drawn(file.rows)
    least, size = size or 1, size or COMPLETIONS
    asked = dict.fromkeys([*prompts, *(str(prompt) for prompt, _ in rows)])
    if new := [prompt for prompt in asked if drawn.get(prompt, 0) < least]:
        with err_console.status(f"drawing {size} completions of each of {len(new)} prompts"):
            fresh = Pool.drawn(lm(), new, size, max_new_tokens=max_new_tokens, seed=seed)
        pairs = zip(fresh.prompts, fresh.completions, strict=True)
        batch: list[dict[str, Any]] = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        batch[-1]["drawn"] = size
        for row in batch:
            file.append(row)
    return Pool([str(row["prompt"]) for row in file.rows], [str(row["completion"]) for row in file.rows])


def _drawn(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many completions were drawn of each prompt, as the rows of a pool have it."""
    drawn: dict[str, int] = {}
    batch: set[str] = set()
    for row in rows:
        batch.add(row["prompt"])
        if isinstance(number := row.get("drawn"), int):
            drawn |= {prompt: max(number, drawn.get(prompt, 0)) for prompt in batch}
            batch.clear()
    return drawn


def _loop(pool: Pool, acquisition: Any, name: str, components: int, lm: _Lazy, seed: int) -> Elicitation:
    from bayeslm.inference.preferences import Elicitation
    from bayeslm.models.preferences import BradleyTerry, LastHidden, SentenceEmbedding, Standardised

    with err_console.status("reading the completions"):
        read = SentenceEmbedding() if name == "sentence" else LastHidden(lm())
        whole = Standardised(read, pool.prompts, pool.completions)
        vary = whole.axes.shape[1]
        features = Standardised(whole.features, pool.prompts, pool.completions, min(components, vary))
    return Elicitation(BradleyTerry(features, scale=4.0), acquisition, seed=seed)


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
        raise ValueError(f"--ask {name} is none of {', '.join(makers)}")
    return makers[name]()


def _simulated(name: str, temperature: float, seed: int) -> Any:
    from bayeslm.models import rewards
    from bayeslm.models.preferences import SimulatedJudge

    sys.path.insert(0, str(Path.cwd()))  # package.module:function is looked for where the user stands
    return SimulatedJudge(rewards.load(name) if ":" in name else rewards.get(name), temperature, seed)


def _answer(row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> Answer:
    """A label; one that something else has written was shown chosen first, and foreseen by nobody."""
    from bayeslm.models.preferences import Answer

    probability = row.get("probability")
    first_is_better = row.get("first_is_better") is not False
    first, second = (chosen, rejected) if first_is_better else (rejected, chosen)
    return Answer(prompt, first, second, 0.5 if probability is None else float(probability), first_is_better)


def _skip(row: dict[str, Any]) -> Answer:
    from bayeslm.models.preferences import Answer

    return Answer(str(row.get("prompt")), str(row.get("first")), str(row.get("second")), 0.5, None)
