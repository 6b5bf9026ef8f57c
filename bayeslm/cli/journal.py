"""A file of JSON lines that grows by one object at a time, each on the disk before the next.

What was written stays, whatever happens to the process. A last line that a crash tore in the middle is mended when the
file is opened again: an object that is whole but for its line's end is kept, and a part of one is taken away. Of a file
that is no journal nothing is taken away.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bayeslm.files import hold


class Journal:
    """The objects of a file, in their order, which is made if it is not there; use it in a ``with`` block.

    :raises BlockingIOError: if another process has it open.
    :raises ValueError: if a line, other than a torn last one, is no JSON object; with its number.
    :raises OSError: if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115, closed by `close`
        try:
            hold(self._file.fileno(), f"{self.path} is open in another process")
            self.mended: str | None = None
            """What was torn, and is no longer there."""
            self.rows, self._starts = self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object; it is on the disk on return.

        :raises OSError: if it could not be written, as on a full disk; then nothing of it is in the file.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._cut(start)
            raise
        self.rows.append(dict(row))
        self._starts.append(start)

    def pop(self) -> dict[str, Any]:
        """Take the last object away again.

        :raises IndexError: if there is none.
        """
        row = self.rows.pop()
        self._cut(self._starts.pop())
        return row

    def _cut(self, at: int) -> None:
        self._file.truncate(at)
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The objects, and where each one's line starts."""
        self._file.seek(0)
        rows: list[dict[str, Any]] = []
        starts: list[int] = []
        start = 0
        for number, line in enumerate(io.BytesIO(self._file.read()), start=1):  # which are parted by \n alone
            torn = not line.endswith(b"\n")
            try:
                row = json.loads(line.decode()) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"it is {line.decode():.60}")
            except ValueError as error:  # of JSON and of UTF-8 too
                if not (torn and _begins_an_object(line)):
                    raise ValueError(f"{self.path}: line {number} is no JSON object: {error}") from None
                self.mended = line.decode(errors="replace")
                self._cut(start)
                break
            if torn:
                self._file.write(b"\n")
            if row is not None:
                rows.append(row)
                starts.append(start)
            start += len(line)
        return rows, starts


def _begins_an_object(line: bytes) -> bool:
    """Whether it may be a part of what `Journal.append` writes."""
    return line.startswith(b'{"') or line == b"{"
