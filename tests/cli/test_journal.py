"""A journal keeps its objects through crashes and failed writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bayeslm.cli.journal import Journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def rows(path):
    """What another tool reads, but for the checksums."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: x for key, x in row.items() if key != "crc32"} for row in found]


def test_appends_pops_and_reads_again(path):
    with Journal(path) as journal:
        assert journal.rows == []
        journal.append({"text": "naïve 🙂\nline"})
        journal.append({"a": 1})
        assert rows(path)[1] == {"a": 1}
        assert journal.pop() == {"a": 1}
        journal.append({"b": 2})
    with Journal(path) as journal:
        assert journal.rows == [{"text": "naïve 🙂\nline"}, {"b": 2}]
        assert journal.removed is None
        assert [journal.pop(), journal.pop()] == [{"b": 2}, {"text": "naïve 🙂\nline"}]
        with pytest.raises(IndexError):
            journal.pop()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("tail", "kept", "removed"),
    [
        (b'{"b": 2}', [{"a": 1}, {"b": 2}], False),
        (b"{", [{"a": 1}], True),
        (b'{"b": ', [{"a": 1}], True),
        (b'{"b": "\xc3', [{"a": 1}], True),
    ],
)
def test_an_incomplete_last_line_is_repaired(path, tail, kept, removed):
    path.parent.mkdir()
    path.write_bytes(b'{"a": 1}\n\n' + tail)
    with Journal(path) as journal:
        assert journal.rows == kept
        assert (journal.removed is not None) == removed
        journal.append({"c": 3})
        journal.pop()
        journal.append({"d": 4})
    with Journal(path) as journal:
        assert journal.rows == [*kept, {"d": 4}]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '"text"'])
def test_any_other_bad_line_is_refused_with_its_number(path, line):
    path.parent.mkdir()
    before = f'{{"a": 1}}\n{line}\n{{"b": 2}}\n'
    path.write_text(before)
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        Journal(path)
    assert path.read_text() == before


@pytest.mark.parametrize("tail", [b"[1]", b"text", b'[{"a": 1}]', b"3", b"{a: 1", b'{"a": \r[1]'])
@pytest.mark.parametrize("head", [b"", b'{"a": 1}\n'])
def test_a_file_of_another_kind_is_not_changed(path, head, tail):
    r"""Its last line lacks an end, but is no part of an object; or it contains a \r, which does not end a line."""
    path.parent.mkdir()
    before = head + tail + (b"\n" if b"\r" in tail else b"")
    path.write_bytes(before)
    with pytest.raises(ValueError, match=f"line {len(head.splitlines()) + 1} is not a JSON object"):
        Journal(path)
    assert path.read_bytes() == before


def test_every_byte_of_a_line_is_checked(path):
    """Whichever has a bit flipped: the file is refused, or what is read is what was written."""
    row = {"prompt": "été", "chosen": "good", "first_is_better": True, "probability": 0.25}
    with Journal(path) as journal:
        journal.append(row)
        journal.append(row)
    content = path.read_bytes()
    refused = 0
    for i in range(len(content) // 2):  # of the first line
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 7]) + content[i + 1 :])
        try:
            with Journal(path) as journal:
                assert all(row.items() <= x.items() for x in journal.rows)
        except ValueError:
            refused += 1
    assert refused > 0.9 * len(content) / 2
    path.write_bytes(content.replace(b"good", b"best", 1))
    with pytest.raises(ValueError, match='if you have edited it, remove its "crc32"'):
        Journal(path)


def test_a_failed_write_leaves_nothing_of_it(path, monkeypatch):
    with Journal(path) as journal:
        journal.append({"a": 1})

        def full(descriptor):
            raise OSError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="disk full"):
                journal.append({"b": 2})
        assert rows(path) == [{"a": 1}]
        assert journal.rows == [{"a": 1}]
        journal.append({"c": 3})
    assert rows(path) == [{"a": 1}, {"c": 3}]


def test_each_object_outlives_its_process(path):
    """The process ends at once after its second object."""
    code = (
        "import os, sys; from bayeslm.cli.journal import Journal; j = Journal(sys.argv[1]);"
        "j.append({'a': 1}); j.append({'b': 2}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}, {"b": 2}]


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_one_writer_at_a_time(path):
    with Journal(path), pytest.raises(BlockingIOError, match="another process"):
        Journal(path)
    with Journal(path):
        pass
