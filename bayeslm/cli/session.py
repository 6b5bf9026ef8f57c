"""A session of `bayeslm label`: questions to a judge, answers in files, and how well the answers were predicted."""

from __future__ import annotations

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
            self.answers = [_label(row, *three) for row, three in zip(labels.rows, texts, strict=True)]
        for row in reversed(skipped.rows):  # the last first, so that earlier positions stay valid
            self.answers.insert(row.get("after", 0), _skip(row))

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
                    self._keep(question.with_answer(judge(question.prompt, question.first, question.second)))
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


def _label(row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> Answer:
    """Return the answer of a row. A row of another tool counts as shown in the order chosen, rejected, at odds 1:1."""
    from bayeslm.models.preferences import Answer

    probability = row.get("probability")
    first_is_better = row.get("first_is_better") is not False
    first, second = (chosen, rejected) if first_is_better else (rejected, chosen)
    return Answer(prompt, first, second, 0.5 if probability is None else float(probability), first_is_better)


def _skip(row: dict[str, Any]) -> Answer:
    """Return the answer of a row of skipped pairs."""
    from bayeslm.models.preferences import Answer

    return Answer(str(row.get("prompt")), str(row.get("first")), str(row.get("second")), 0.5, None)
