"""Prompts and columns in files of every kind, and errors with the place of what is wrong."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path

import pytest

from bayeslm.prompt_files import read_prompt_file

CHAT = [{"role": "user", "content": "hi"}]
ODD = "a\u2028b\u0085c\x0cd\x1ce"  # characters at which str.splitlines splits
LINES = [{"prompt": ODD, "answer": 4}, {"prompt": 'é, "q"', "answer": 5.5}]
JSONL = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in LINES)
CSV = f'prompt,answer\n{ODD},4\n\n"é, ""q""",5.5\n'
EXPECTED = ([ODD, 'é, "q"'], {"answer": [4, 5.5]})
KINDS = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL.replace("\n", "\r\n"),
    "a.json": json.dumps(LINES, indent=2),
    "lines.json": JSONL,
    "columns.json": json.dumps({"prompt": EXPECTED[0], "answer": [4, 5.5]}),
    "pandas.json": json.dumps({"prompt": dict(enumerate(EXPECTED[0])), "answer": {0: 4, 1: 5.5}}),
    "document.jsonl": json.dumps(LINES, indent=2, ensure_ascii=False),
    "a.csv": CSV,
    "index.csv": f',prompt,answer\n0,{ODD},4\n1,"é, ""q""",5.5\n',
    "a.tsv": f'answer\tprompt\r\n4\t{ODD}\r\n5.5\t"é, ""q"""',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_prompts_and_columns(name: str, upper: bool, encoding: str, tmp_path: Path):
    path = tmp_path / (name.upper() if upper else name)
    path.write_bytes(KINDS[name].encode(encoding))
    prompts, columns = read_prompt_file(path)
    assert (prompts, columns) == EXPECTED
    assert list(map(type, columns["answer"]))[1] is float


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "A.TXT"])
def test_other_files_are_lines_of_text(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + f"  first {ODD}\r\n\n \t\nsecond \rthird".encode())
    assert read_prompt_file(tmp_path / name) == ([f"  first {ODD}", "second ", "third"], {})


def nested(levels: int) -> list:
    return [] if levels == 1 else [nested(levels - 1)]


@pytest.mark.parametrize(
    ("name", "text", "prompts", "columns"),
    [
        ("a.json", '{"prompt": "one", "answer": ["a", "b"]}', ["one"], {"answer": [["a", "b"]]}),
        ("a.json", '["one", "two"]', ["one", "two"], {}),
        ("a.json", '"one"', ["one"], {}),
        ("a.jsonl", '"one"\n"two"', ["one", "two"], {}),
        ("a.jsonl", '{"prompt": "", "answer": NaN}', [""], {"answer": [None]}),
        ("a.json", json.dumps({"prompt": CHAT}), [CHAT], {}),
        ("a.jsonl", json.dumps({"prompt": CHAT}), [CHAT], {}),
        ("a.json", json.dumps([CHAT, CHAT]), [CHAT, CHAT], {}),
        ("a.json", json.dumps({"prompt": [5, 6]}), [[5, 6]], {}),
        ("a.json", json.dumps({"prompt": [[5, 6], [7]]}), [[5, 6], [7]], {}),
        ("a.json", '{"prompt": {"0": "a", "7": "b"}, "n": {"7": 2, "0": 1}}', ["a", "b"], {"n": [1, 2]}),  # by name
        ("a.json", '{"prompt": {"x": [5], "y": [6]}}', [[5], [6]], {}),
        ("a.csv", f"prompt,x\n{'a' * 200_000},1\n", ["a" * 200_000], {"x": [1]}),
        ("a.jsonl", f'{{"prompt": "a", "x": {"[" * 64 + "]" * 64}}}', ["a"], {"x": [nested(64)]}),
        ("a.csv", 'prompt\n"two\nlines"\n', ["two\nlines"], {}),
        ("a.csv", "prompt\n42\nNA\nnull\n", ["42", "NA", "null"], {}),
        ("a.csv", "prompt,n\na,1\nb,\nc,-3\n", ["a", "b", "c"], {"n": [1, None, -3]}),
        ("a.csv", "prompt,n\na,1\nb,2e3\n", ["a", "b"], {"n": [1.0, 2000.0]}),
        ("a.csv", "prompt,n\na,1.50\nb,2.00\n", ["a", "b"], {"n": ["1.50", "2.00"]}),  # answers, as they are written
        ("a.csv", "prompt,n\na,1.5\nb,2.0\n", ["a", "b"], {"n": [1.5, 2.0]}),
        ("a.csv", "prompt,n\na,True\nb,false\n", ["a", "b"], {"n": [True, False]}),
        ("a.csv", "prompt,n\na,007\nb,12\n", ["a", "b"], {"n": ["007", "12"]}),  # no number is written so
        ("a.csv", "prompt,n\na,nan\nb,1\n", ["a", "b"], {"n": ["nan", "1"]}),
        ("a.csv", "prompt,n\na,1e999\n", ["a"], {"n": ["1e999"]}),
        ("a.csv", "prompt, n\na,\n", ["a"], {"n": [None]}),
    ],
)
def test_forms_of_rows(name: str, text: str, prompts: list, columns: dict, tmp_path: Path):
    (tmp_path / name).write_text(text)
    found = read_prompt_file(tmp_path / name)
    assert found == (prompts, columns)
    assert [list(map(type, x)) for x in found[1].values()] == [list(map(type, x)) for x in columns.values()]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        *[(name, b"", "holds no prompts") for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv")],
        *[(name, b"\n \n\r\n", "holds no prompts") for name in ("a.txt", "a.jsonl", "a.json")],
        ("a.csv", b"prompt,answer\n", "holds no prompts"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.json", b'{"prompt": []}', "holds no prompts"),
        ("a.jsonl", b'\n\n{"prompt": "a"}\n\n{"prompt": "b"', "line 5 is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "line 2 must be an object with a \"prompt\", and has 'text'"),
        ("a.jsonl", b'{"prompt": "a", "x": 1}\n\n{"prompt": "b"}', r"line 3 has columns .*, but line 1 has .*'x'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 5}', "line 2: the prompt is 5: it must be a text in quotes"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": true}', "line 2: the prompt is True"),
        ("a.jsonl", b'{"prompt": null}', "line 1: the prompt is missing"),
        ("a.jsonl", b'{"prompt": NaN}', "line 1: the prompt is missing"),
        ("a.jsonl", b'{"prompt": []}', "line 1: the prompt is \\[\\]"),
        ("a.jsonl", b'{"prompt": [1, "a"]}', "line 1: the prompt is"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 is no JSON .'prompt' is repeated"),
        ("a.jsonl", b'{"prompt": "\\ud83d!"}', "line 1: the prompt holds the lone surrogate '.ud83d' at character 0"),
        ("a.jsonl", json.dumps({"prompt": [{"role": "user", "content": "\udc80"}]}).encode(), "line 1.*lone surrogate"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', "line 2 is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        *[
            (name, f'{{"prompt": "a", "x": {"[" * levels + "]" * levels}}}'.encode(), "'x' has more than 64 lists")
            for name in ("a.json", "a.jsonl")
            for levels in (65, 400, 900)
        ],
        ("a.jsonl", b'{"prompt": [{"role": "user", "content": ' + b"[" * 70 + b"]" * 70 + b"}]}", "more than 64 lists"),
        ("a.json", b'{"prompt": {"0": "a"}, "n": {"1": 1}}', "column 'n' has other rows than 'prompt', which has 0"),
        ("a.json", b'{"prompt": {"0": "a"}, "n": [1]}', "column 'n' has other rows"),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "is no JSON .*line 3 column 11"),
        ("a.json", b'{"prompt": ["a", "b"], "answer": ["c"]}', "column 'answer' is no list of 2 values"),
        ("a.json", b'{"text": ["a", "b"]}', "must be an object with a \"prompt\", and has 'text'"),
        ("a.json", b"5", "row 1: the prompt is 5"),
        ("a.csv", b"text,answer\na,b\n", "has no column 'prompt'; its columns are 'text', 'answer'"),
        ("a.csv", b"prompt;answer\na;b\n", "has no column 'prompt'; its columns are 'prompt;answer'"),
        ("a.csv", b"prompt,answer,answer\na,b,c\n", "has two columns 'answer'"),
        ("a.csv", b"prompt,answer\na,b\n\nc,d,e\n", "line 4 has 3 cells, but there are 2 columns"),
        ("a.csv", b'prompt,answer\n"a\nb",c\nd\n', "line 4 has 1 cells"),
        ("a.csv", b"prompt,answer\na,b\n,c\n", "line 3: the prompt is missing"),
        ("a.csv", b'prompt\n"a\n', "line 2: unexpected end of data"),
        ("a.txt", b"a\nb\ncaf\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9\)"),
        ("a.csv", "prompt\ncafé\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "holds NUL characters"),
        ("a.txt", codecs.BOM_UTF16_LE + b"abc", "begins as UTF-16, and is none"),
        ("a.xlsx", b"PK\x03\x04\xff\xfe", "is a file of another kind"),
        ("a.unknown", b"PK\x03\x04\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name: str, content: bytes, says: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_prompt_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_folders_and_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="is a folder: give a file of prompts"):
        read_prompt_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv"):
        read_prompt_file(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "no_suffix"])
def test_parquet(name: str, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"prompt": ["a", "b"], "answer": [4, None], "words": [["x"], []], "weight": [0.5, float("nan")]}
    parquet.write_table(pyarrow.table(table), tmp_path / name)
    table["weight"][1] = None
    assert read_prompt_file(tmp_path / name) == (table.pop("prompt"), table)
    chats = {"prompt": [CHAT, CHAT]}
    parquet.write_table(pyarrow.table(chats), tmp_path / name)
    assert read_prompt_file(tmp_path / name) == (chats["prompt"], {})
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / name)
    with pytest.raises(ValueError, match="has no column 'prompt'; its columns are 'text'"):
        read_prompt_file(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:9] + whole[-9:])
    with pytest.raises(ValueError, match="is no readable Parquet file"):
        read_prompt_file(tmp_path / name)
    for other in ("a.txt", "a.csv", "a.jsonl"):
        (tmp_path / other).write_bytes(whole)
        with pytest.raises(ValueError, match=rf"is Parquet, and its suffix \{Path(other).suffix} says otherwise"):
            read_prompt_file(tmp_path / other)


@pytest.mark.parametrize("name", ["a.txt", "a.list", "no_suffix"])
@pytest.mark.parametrize("text", ["PAR1 and no more", "PAR1", "PAR1\nmore PAR1"])
def test_text_that_begins_as_parquet_does(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    assert read_prompt_file(tmp_path / name) == (text.split("\n"), {})


@pytest.mark.parametrize(
    "value", ["\ud800", ["a", "\udc00"], {"a": ["b", "\ud800"]}, {"\ud800": 1}, [["x", {"y": "\udfff"}]]]
)
def test_a_lone_surrogate_in_a_column_is_named_with_its_row(value: object, tmp_path: Path):
    rows = [{"prompt": "a", "answer": "fine 😀"}, {"prompt": "b", "answer": value}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: 'answer' holds the lone surrogate"):
        read_prompt_file(tmp_path / "a.jsonl")


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r'needs pyarrow: pip install "bayeslm\[parquet\]"'):
        read_prompt_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".xlsx", ".yaml", ".jsonl.gz", ".PKL"])
def test_files_of_other_formats_are_no_lines_of_text(suffix, tmp_path):
    path = tmp_path / f"prompts{suffix}"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="is a file of another kind: give"):
        read_prompt_file(path)
