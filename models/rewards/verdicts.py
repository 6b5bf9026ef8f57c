"""Verdicts of a judge on the disk: a SQLite file, which several processes may use at once."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

PATIENCE = 30.0  # seconds for another process's transaction
TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL, reply TEXT NOT NULL)"


class Verdicts:
    """Scores and replies by key.

    :param path: of the file, which is made with its folder before the first request.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the scores of those keys that have one; the file is made, so that no verdict is paid for and lost.

        :raises ValueError: if the file is damaged, none of verdicts, or cannot be written.
        """
        query = "SELECT score FROM verdicts WHERE key = ?"
        with self._open() as connection:
            rows = {key: connection.execute(query, (key,)).fetchone() for key in keys}
        found = {key: row[0] for key, row in rows.items() if row is not None}
        if any(not isinstance(score, float) or not math.isfinite(score) for score in found.values()):
            raise ValueError(f"{self.path} has a verdict that is no number: it is damaged, remove it")
        return found

    def put(self, key: str, score: float, reply: str) -> None:
        """Keep a verdict, on the disk when this returns.

        :raises ValueError: if the file is damaged, or none of verdicts.
        """
        with self._open() as connection, connection:
            connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, score, reply))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as connection:
                connection.execute(TABLE)
                yield connection
        except (sqlite3.DatabaseError, OSError, ValueError) as error:
            if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.OperationalError):
                what = "name a file in a folder that can be written"
            else:
                what = "remove it"
            raise ValueError(f"{self.path} cannot be used as a cache of verdicts ({error}): {what}") from error
