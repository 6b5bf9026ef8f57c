"""The command `bayeslm label`: teach a reward by saying which of two completions is better."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayeslm.console import INTERRUPTED, clear_errors, err_console, language_model, out_console, read_prompts
from bayeslm.journal import Journal

if TYPE_CHECKING:
    from bayeslm.inference import Elicitation, Pool
    from bayeslm.models.preferences import Answer

RECENT = 20  # answers that a second share of foreseen ones is of


class Undo(Exception):
    """The judge takes the last answer back."""


class Quit(Exception):
    """The judge has had enough."""


def label(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; none where OUT has some already.")] = None,
    out: Annotated[
        Path, typer.Option(help="JSON lines of prompt, chosen and rejected; where it exists, it is gone on with.")
    ] = Path("labels.jsonl"),
    prompts: Annotated[Path | None, typer.Option(help='A file of prompts: one a line, or JSONL with "prompt".')] = None,
    model: Annotated[
        str, typer.Option(help="Draws completions: smollm2, a folder, or a name on the Hugging Face hub.")
    ] = "smollm2",
    completions: Annotated[int, typer.Option(help="Draws for each prompt, among which pairs are chosen.")] = 16,
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
        if completions < 2:
            raise ValueError(f"--completions must be at least 2, got {completions}")
        acquisition = _acquisition(ask)
        answering = _Person() if judge is None else _simulated(judge, temperature, seed)
        given = read_prompts(prompt or [], prompts)[0] if prompt or prompts else []
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
    :param skipped: rows of prompt, first and second.
    """

    def __init__(self, labels: Journal, skipped: Journal, loop: Elicitation, pool: Pool) -> None:
        from bayeslm.models.preferences import Comparisons

        self._labels, self._skipped = labels, skipped
        self._loop, self._pool = loop, pool
        if labels.rows:
            Comparisons.from_jsonl(labels.path)  # says what is wrong with which line
        self.answers = [_skip(row) for row in skipped.rows] + [_answer(row) for row in labels.rows]

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
                    judge_is_person = isinstance(judge, _Person)
                    if judge_is_person:
                        self.show()
        except Quit:
            return False
        except KeyboardInterrupt:
            return True
        return False

    def _keep(self, answer: Answer) -> None:
        if answer.first_is_better is None:
            self._skipped.append({"prompt": answer.prompt, "first": answer.first, "second": answer.second})
        else:
            chosen, rejected = answer.first, answer.second
            if not answer.first_is_better:
                chosen, rejected = rejected, chosen
            row = {"prompt": answer.prompt, "chosen": chosen, "rejected": rejected}
            shown = {"first_is_better": answer.first_is_better, "probability": answer.probability}
            self._labels.append(row | shown)
        self.answers.append(answer)

    def _undo(self) -> None:
        if not self.answers:
            err_console.print("there is nothing to take back", style="yellow")
            return
        answer = self.answers.pop()
        (self._skipped if answer.first_is_better is None else self._labels).pop()

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

        def spread(answers: list[Answer]) -> float:
            weights = self._loop.weights(answers, self._pool.example)
            rewards = self._loop.model.reward(self._pool.prompts, self._pool.completions, weights)
            pairs = self._pool.pairs()
            return float((rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).var(0).mean().sqrt())

        return spread(self.answers) / spread([])


class _Person:
    """The one at the terminal."""

    def __call__(self, prompt: str, first: str, second: str) -> bool | None:
        out_console.print()
        out_console.print(prompt, style="bold", markup=False, highlight=False)
        for key, text in (("1", first), ("2", second)):
            out_console.print(f"  {key}  {' '.join(text.split())}", markup=False, highlight=False)
        while True:
            try:
                key = out_console.input("better: 1 or 2 (s skip, u undo, q quit) ").strip().lower()
            except EOFError:
                raise Quit from None
            if key in ("1", "2"):
                return key == "1"
            if key == "s":
                return None
            if key == "u":
                raise Undo
            if key == "q":
                raise Quit
            out_console.print(f"{key!r} is none of 1, 2, s, u, q", markup=False, highlight=False)


class _Lazy:
    """The language model, which a session that goes on may not need."""

    def __init__(self, name: str, device: str | None) -> None:
        self._of = name, device
        self._lm: Any = None

    def __call__(self) -> Any:
        if self._lm is None:
            self._lm = language_model(*self._of).packed()
        return self._lm


@contextmanager
def _files(out: Path) -> Iterator[dict[str, Journal]]:
    """The labels, and what lies beside them."""
    paths = {"labels": out} | {name: out.with_suffix(f".{name}.jsonl") for name in ("pool", "skipped")}
    with ExitStack() as stack:
        files = {name: stack.enter_context(Journal(path)) for name, path in paths.items()}
        for file in files.values():
            if file.mended is not None:
                err_console.print(
                    f"{file.path}: a last line that was torn is taken away: {file.mended:.60}", markup=False
                )
        yield files


def _pool(file: Journal, prompts: list[str], lm: _Lazy, size: int, max_new_tokens: int, seed: int) -> Pool:
    """The completions in the file, and new ones of prompts that it has none of."""
    from bayeslm.inference import Pool

    rows = [(row.get("prompt"), row.get("completion")) for row in file.rows]
    if bad := [i for i, row in enumerate(rows) if not all(isinstance(text, str) for text in row)]:
        raise ValueError(f"{file.path}: row {bad[0] + 1} needs strings for prompt and completion")
    if not (rows or prompts):
        raise ValueError('no prompts: give one, as in bayeslm label "My dinner was", or --prompts FILE')
    if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in {known for known, _ in rows}]:
        with err_console.status(f"drawing {size} completions of each of {len(new)} prompts"):
            drawn = Pool.drawn(lm(), new, size, max_new_tokens=max_new_tokens, seed=seed)
        for pair in zip(drawn.prompts, drawn.completions, strict=True):
            file.append(dict(zip(("prompt", "completion"), pair, strict=True)))
            rows.append(pair)
    return Pool([str(prompt) for prompt, _ in rows], [str(completion) for _, completion in rows])


def _loop(pool: Pool, acquisition: Any, name: str, components: int, lm: _Lazy, seed: int) -> Elicitation:
    from bayeslm.inference import Elicitation
    from bayeslm.models.preferences import BradleyTerry, LastHidden, SentenceEmbedding, Standardised

    makers: dict[str, Any] = {"sentence": SentenceEmbedding, "hidden": lambda: LastHidden(lm())}
    if name not in makers:
        raise ValueError(f"--features {name} is none of {', '.join(makers)}")
    if components < 1:
        raise ValueError(f"--components must be at least 1, got {components}")
    with err_console.status("reading the completions"):
        whole = Standardised(makers[name](), pool.prompts, pool.completions)
        vary = whole.axes.shape[1]
        features = Standardised(whole.features, pool.prompts, pool.completions, min(components, vary))
    return Elicitation(BradleyTerry(features, scale=4.0), acquisition, seed=seed)


def _acquisition(name: str) -> Any:
    from bayeslm.inference import Duel, EpsilonGreedy, InformationGain, Random, Thompson

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


def _answer(row: dict[str, Any]) -> Answer:
    """A label; one that something else has written was shown chosen first, and foreseen by nobody."""
    from bayeslm.models.preferences import Answer

    first_is_better = row.get("first_is_better", True)
    first, second = (row["chosen"], row["rejected"])[:: 1 if first_is_better else -1]
    return Answer(row["prompt"], first, second, float(row.get("probability", 0.5)), bool(first_is_better))


def _skip(row: dict[str, Any]) -> Answer:
    from bayeslm.models.preferences import Answer

    return Answer(str(row.get("prompt")), str(row.get("first")), str(row.get("second")), 0.5, None)
