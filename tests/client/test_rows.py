"""JSON lines become rows, or one clear line that names the file and the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.rows import Row, parse_row, read_json_lines, row_digest
from meadow.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_reads_every_kind_of_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "Why?", "response": "So.", "client": "a", "split": "test", "label": "l"},
        "",
        {"text": "plain", "client": None, "other": [1]},
        {"prompt": "", "response": "r", "client": 7, "label": 3},
    )
    assert list(read_json_lines(path)) == [
        Row("a", "Why?", "So.", "test", "l"),
        Row("all", "", "plain", "", "all"),
        Row("7", "", "r", "", "3"),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_breaks_lines_at_line_feeds_alone(tmp_path: Path, name: str) -> None:
    text = "one\u2028two\x85three\x0cfour"
    line = json.dumps({"text": text}, ensure_ascii=False).replace("\\f", "\\u000c") + "\r\n"
    data = b"\xef\xbb\xbf" + line.encode() * 2
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.response for row in read_json_lines(tmp_path / name)] == [text, text]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"text": ' + "1" * 5000 + "}", "malformed JSON"),
        ("[1]", "JSON object, not list"),
        ("{}", "neither text nor prompt"),
        ('{"client": "a", "text": "  "}', "neither text nor prompt"),
        ('{"prompt": "a"}', "prompt without a response"),
        ('{"prompt": "a", "response": " "}', "prompt without a response"),
        ('{"response": "a"}', "response without a prompt"),
        ('{"text": "a", "prompt": "b", "response": "c"}', "text beside prompt"),
        ('{"text": 1}', "text is a string, not int"),
        ('{"prompt": ["a"], "response": "b"}', "prompt is a string, not list"),
        ('{"text": "a", "client": true}', "client is a string, not bool"),
        ('{"text": "a", "split": "dev"}', "split is 'train' or 'test', not 'dev'"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "good"}, line)
    with pytest.raises(DataError) as caught:
        list(read_json_lines(path))
    assert f"{path} line 2: " in str(caught.value) and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        list(read_json_lines(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 50)
    (tmp_path / "torn.gz").write_bytes(whole[:-12])
    (tmp_path / "other.gz").write_bytes(b"plain")
    for name, says in [("torn.gz", "cannot be read"), ("other.gz", "gzip"), ("no", "no such file")]:
        with pytest.raises(DataError, match=says):
            list(read_json_lines(tmp_path / name))


@given(TEXT, TEXT)
def test_what_is_written_is_read(prompt: str, response: str) -> None:
    row = parse_row(json.loads(json.dumps({"prompt": prompt, "response": response})), "here")
    assert (row.prompt, row.response) == (prompt, response)


def test_the_digest_is_of_content_and_keeps_its_parts_apart() -> None:
    row = Row("a", "ab", "c", "train", "x")
    assert row_digest(row) == row_digest(Row("b", "ab", "c", "", "y"))
    assert row_digest(row) != row_digest(Row("a", "a", "bc", "train", "x"))
