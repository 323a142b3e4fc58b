"""Rows from files, folders, `datasets` and the standard library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.sources import cut, read_rows
from meadow.errors import DataError
from meadow.nano.corpus import PARTICIPANTS, held_out_files, package_files, read_source

RECORDS = [{"text": f"t{number}", "client": "ab"[number % 2]} for number in range(6)]


def test_files_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    texts = [row.response for row in read_rows(str(tmp_path / "[ab].jsonl"), 100)]
    assert texts == ["a.jsonl", "b.jsonl"]
    both = [str(tmp_path / "odd[1].jsonl"), str(tmp_path / "a.*")]
    assert [row.response for row in read_rows(both, 100)] == ["odd[1].jsonl", "a.jsonl"]


def test_missing_or_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, says in [
        ("no.jsonl", "no such file"),
        ("*.txt", "matches no file"),
        ("empty.jsonl", "no rows in"),
    ]:
        with pytest.raises(DataError, match=says):
            read_rows(str(tmp_path / source), 100)
    with pytest.raises(DataError, match="no rows in an empty list"):
        read_rows([], 100)


def test_a_folder_of_text_has_a_client_per_entry(tmp_path: Path) -> None:
    (tmp_path / "ann" / "deep").mkdir(parents=True)
    (tmp_path / "ann" / "2.txt").write_text("two")
    (tmp_path / "ann" / "deep" / "3.txt").write_text("three")
    (tmp_path / "bob.txt").write_text("one\ntwo\n")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / "ann" / ".hidden").write_text("never")
    rows = read_rows(str(tmp_path), 4)
    assert [(row.client, row.response) for row in rows] == [
        ("ann", "two"), ("ann", "three"), ("bob", "one\n"), ("bob", "two\n"),
    ]  # fmt: skip
    assert {(row.prompt, row.split) for row in rows} == {("", "")}


def test_folders_that_are_no_text(tmp_path: Path) -> None:
    cases = {"binary": b"\xff\xfe", "blank": b" \n", "rows.jsonl": b"{}"}
    for name, data in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(data)
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(str(tmp_path / "binary"), 100)
    with pytest.raises(DataError, match="participant 'blank' has no text"):
        read_rows(str(tmp_path / "blank"), 100)
    with pytest.raises(DataError, match="is not plain text"):
        read_rows(str(tmp_path / "rows.jsonl"), 100)
    (tmp_path / "twice").mkdir()
    for name in ("a.txt", "a.md"):
        (tmp_path / "twice" / name).write_text("text")
    with pytest.raises(DataError, match="more than one entry for client 'a'"):
        read_rows(str(tmp_path / "twice"), 100)


@given(st.text(alphabet="ab \n\u2028", max_size=80), st.integers(1, 20))
def test_pieces_are_whole_lines_of_bounded_length(text: str, chunk: int) -> None:
    pieces = list(cut(text, chunk))
    assert all(piece.strip() for piece in pieces)
    assert all(len(piece) <= chunk or "\n" not in piece[:-1] for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_nano_holds_out_files() -> None:
    rows = read_rows("nano", 500)
    assert {row.client for row in rows} == set(PARTICIPANTS)
    for package in PARTICIPANTS:
        files = package_files(package)
        held_out = held_out_files(files)
        for split, some in (("train", set(files) - held_out), ("test", held_out)):
            source = "".join(read_source(file) or "" for file in sorted(some))
            found = [row.response for row in rows if (row.client, row.split) == (package, split)]
            assert found and sum(map(len, found)) <= len(source)
            assert all(piece in source for piece in found)


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, extra=data.select([3])).save_to_disk(tmp_path / "many")
    wanted = [("ab"[number % 2], f"t{number}") for number in range(6)]
    for source in (tmp_path / "one", f"datasets:{tmp_path / 'one'}", f"datasets:{tmp_path}/many"):
        rows = read_rows(str(source), 100)
        assert [(row.client, row.response) for row in rows] == wanted
    assert read_rows(f"datasets:{tmp_path / 'many'}:extra", 100)[0].response == "t3"
    with pytest.raises(DataError, match="no split 'dev' .it has train, extra"):
        read_rows(f"datasets:{tmp_path / 'many'}:dev", 100)


def test_datasets_with_other_columns(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(tmp_path / "qa")
    with pytest.raises(DataError, match=r"row 1 \(columns question, answer\): has neither text"):
        read_rows(str(tmp_path / "qa"), 100)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "the hub cannot be reached"),
        (FileNotFoundError("no such\nthing"), "cannot be loaded: no such"),
        (ValueError('Unknown split "dev"'), "cannot be loaded: Unknown split"),
    ],
)
def test_a_hub_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, says: str
) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=says) as caught:
        read_rows("datasets:someone/something", 100)
    assert "datasets:someone/something" in str(caught.value) and "\n" not in str(caught.value)
