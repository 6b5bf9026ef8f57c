"""A session of `bayeslm label`: questions to a judge, answers in files, and how well the answers were predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .console import err_console, out_console
from .journal import Journal
from .terminal_judge import Quit, TerminalJudge, Undo, one_line

if TYPE_CHECKING:
    from bayeslm.inference.preferences import Elicitation, Pool
    from bayeslm.models.preferences import Answer

RECENT = 20  # the number of last answers whose predictions are also counted separately


class Session:
    """Questions and answers; each answer is written to a file before the next question.

    :param labels: rows of prompt, chosen and rejected, with ``first_is_better``, the order in which the two were shown,
        and ``probability``, the predictive probability of the answer before it was known.
    :param skipped: rows of prompt, first and second, with ``after``, the number of labels before the skip.
    """

    def __init__(self, labels: Journal, skipped: Journal, elicitation: Elicitation, pool: Pool) -> None:
        from bayeslm.models.preferences import Comparisons

        self._labels, self._skipped = labels, skipped
        self._elicitation, self._pool = elicitation, pool
        self.answers: list[Answer] = []
        if labels.rows:
            data = Comparisons.from_jsonl(labels.path)  # refuses a malformed line by its number
            texts = zip(data.prompts, data.chosen, data.rejected, strict=True)
            for number, (row, three) in enumerate(zip(labels.rows, texts, strict=True), start=1):
                with _named(labels, number):
                    self.answers.append(_label(row, *three))
        for number, row in reversed(list(enumerate(skipped.rows, start=1))):  # so that earlier positions stay valid
            with _named(skipped, number):
                self.answers.insert(_position(row), _skip(row))

    @property
    def labels(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.first_is_better is not None]

    def run(self, judge: Any, number: int | None) -> bool:
        """Ask until there are ``number`` labels, no pair is left, or the judge quits.

        Answers before an error of the judge are in the files.

        :param judge: a function of prompt, first and second text, as `TerminalJudge`.
        :returns: whether Ctrl-C ended the session.
        """
        try:
            while number is None or len(self.labels) < number:
                question = self._elicitation.ask(self._pool, self.answers)
                if question is None:
                    err_console.print("no pair is left: all pairs of completions were compared", style="yellow")
                    return False
                try:
                    self._keep(question.put_to(judge, self._elicitation.timeout))
                except Undo:
                    self._undo()
                else:
                    if isinstance(judge, TerminalJudge):
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
            err_console.print("there is no answer to take back", style="yellow")
            return
        answer = self.answers.pop()
        skipped = answer.first_is_better is None
        (self._skipped if skipped else self._labels).pop()
        first, second = one_line(answer.first, answer.second)
        result = "skipped" if skipped else "1 is better" if answer.first_is_better else "2 is better"
        out_console.print(f"taken back: {result}, of 1 {first} and 2 {second}")

    def show(self) -> None:
        """Print how many answers were predicted, and the remaining uncertainty."""
        labels = self.labels
        if not labels:
            return
        predicted = [answer.foreseen for answer in labels]
        recent = predicted[-RECENT:]
        surprisal = sum(answer.surprisal for answer in labels[-RECENT:]) / len(recent)
        out_console.print(
            f"{len(labels)} labels · {sum(predicted)} predicted"
            + (f", {sum(recent)} of the last {len(recent)}" if len(labels) > RECENT else "")
            + f" · {surprisal:.2f} nats per label (guessing: 0.69) · remaining uncertainty {self._uncertainty():.0%}",
            style="dim",
        )

    def _uncertainty(self) -> float:
        """Return the standard deviation of reward differences within prompts, relative to that of the prior."""
        return self._spread(self.answers) / self._prior_spread

    @cached_property
    def _prior_spread(self) -> float:
        return self._spread([])

    def _spread(self, answers: list[Answer]) -> float:
        weights = self._elicitation.weights(answers, self._pool.example)
        rewards = self._elicitation.model.reward(self._pool.prompts, self._pool.completions, weights)
        pairs = self._pool.pairs()
        return float((rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]]).var(0).mean().sqrt())


@contextmanager
def _named(file: Journal, number: int) -> Iterator[None]:
    """Name the file and the row in an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: row {number}: {error}") from None


def _label(row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> Answer:
    """Return the answer of a row. A row of another tool counts as shown in the order chosen, rejected, at odds 1:1."""
    from bayeslm.models.preferences import Answer

    probability, first_is_better = row.get("probability"), row.get("first_is_better")
    if first_is_better is not None and not isinstance(first_is_better, bool):
        raise ValueError(f"first_is_better must be true or false, got {first_is_better!r:.60}")
    first, second = (rejected, chosen) if first_is_better is False else (chosen, rejected)
    return Answer(prompt, first, second, 0.5 if probability is None else probability, first_is_better is not False)


def _position(row: dict[str, Any]) -> int:
    """Return the number of labels before a skipped pair."""
    after = row.get("after", 0)
    if not isinstance(after, int) or isinstance(after, bool) or after < 0:
        raise ValueError(f"after must be a number of labels, got {after!r:.60}")
    return after


def _skip(row: dict[str, Any]) -> Answer:
    """Return the answer of a row of skipped pairs."""
    from bayeslm.models.preferences import Answer

    prompt, first, second = texts = [row.get(name) for name in ("prompt", "first", "second")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt, first and second must be texts, got {texts!r:.60}")
    return Answer(str(prompt), str(first), str(second), 0.5, None)
