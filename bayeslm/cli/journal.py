"""A file of JSON lines to which objects are appended, each flushed to the disk before the next.

Objects that were appended survive the process. An incomplete last line, after a crash, is repaired when the file is
opened: an object that lacks only the end of its line is kept, and a part of an object is removed. A file that is not a
journal is never changed. Each line that is appended ends in its checksum; lines without one, another tool's, are read.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from bayeslm.locking import locked

CHECKSUM = "crc32"


class Journal:
    """The objects of a file, in order; the file is created if it is missing. For use in a ``with`` block.

    :raises BlockingIOError: if another process has the file open.
    :raises ValueError: if a line, other than an incomplete last one, is not a JSON object; with its number.
    :raises OSError: if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115, closed by `close`
        self._held = ExitStack()
        try:
            held = f"{self.path} is open in another process: end that first"
            self._held.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), held))
            self.removed: str | None = None
            """The incomplete last line that was removed, or None."""
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
        self._held.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object and flush it to the disk.

        :raises OSError: if it could not be written, as on a full disk; then no part of it is in the file.
        """
        line = (json.dumps({**row, CHECKSUM: _checksum(row)}, ensure_ascii=False) + "\n").encode()
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
        """Remove the last object from the file and return it.

        :raises IndexError: if there is none.
        """
        row = self.rows.pop()
        self._cut(self._starts.pop())
        return row

    def _cut(self, at: int) -> None:
        self._file.truncate(at)
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the objects, and the position at which the line of each starts."""
        self._file.seek(0)
        rows: list[dict[str, Any]] = []
        starts: list[int] = []
        start = 0
        for number, line in enumerate(io.BytesIO(self._file.read()), start=1):  # separates lines by \n only
            incomplete = not line.endswith(b"\n")
            try:
                row = json.loads(line.decode()) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"{line.decode():.60}")
            except (ValueError, RecursionError) as error:  # of JSON or UTF-8 too
                if not (incomplete and _begins_an_object(line)):
                    raise ValueError(f"{self.path}: line {number} is not a JSON object: {error}") from None
                self.removed = line.decode(errors="replace")
                self._cut(start)
                break
            if row is not None and row.pop(CHECKSUM, None) not in (None, _checksum(row)):
                raise ValueError(
                    f"{self.path}: line {number} is not what was written: if you have edited it, remove its "
                    f'"{CHECKSUM}", else the file is damaged'
                )
            if incomplete:
                self._file.write(b"\n")
            if row is not None:
                rows.append(row)
                starts.append(start)
            start += len(line)
        return rows, starts


def _checksum(row: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"


def _begins_an_object(line: bytes) -> bool:
    """Whether a line may be the start of one that `Journal.append` writes."""
    return line.startswith(b'{"') or line == b"{"
