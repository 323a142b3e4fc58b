"""A run's text is pinned when it begins, and any change of it is seen."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from meadow.client.home import TEXT
from meadow.client.participant_text import ParticipantText, fingerprint, text_digest
from meadow.client.policy import Policy
from meadow.client.rows import Row
from meadow.errors import ConfigError, DataError, JournalError, PolicyError
from meadow.store import Disk

A, B = '{"text": "one"}\n', '{"text": "two"}\n'


def text(folder: Path, run: str = "aa") -> ParticipantText:
    return ParticipantText(folder, run, 600, Disk())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text(A + B)
    return path


def refuses(one: ParticipantText, policy: Policy) -> None:
    with pytest.raises(PolicyError, match="text has changed since the run began"):
        one.current(policy)


def test_unchanged_text_is_read_once(tmp_path: Path, rows: Path) -> None:
    one, policy = text(tmp_path), Policy(data=[str(rows)])
    assert one.current(policy) is one.current(policy)
    assert [row.response for row in one.current(policy).rows] == ["one", "two"]


@pytest.mark.parametrize("changed", [A, B + A, A + B + A, A + B.replace("two", "twO")])
def test_changed_text_is_refused_now_and_by_the_next_process(
    tmp_path: Path, rows: Path, changed: str
) -> None:
    one, policy = text(tmp_path), Policy(data=[str(rows)])
    before = one.current(policy)
    rows.write_text(changed)
    for _ in range(2):
        refuses(one, policy)
    refuses(text(tmp_path), policy)
    rows.write_text(A + B)
    assert one.current(policy).digest == before.digest
    assert text(tmp_path).current(policy).digest == before.digest


def test_a_change_that_keeps_size_and_time_of_the_name_is_seen(tmp_path: Path, rows: Path) -> None:
    one, policy = text(tmp_path), Policy(data=[str(rows)])
    one.current(policy)
    times = rows.stat().st_mtime_ns
    other = rows.with_name("other")
    other.write_text(A + A.replace("one", "owe"))
    os.utime(other, ns=(times, times))
    os.replace(other, rows)
    refuses(one, policy)


def test_accepted_changes_are_the_new_text(tmp_path: Path, rows: Path) -> None:
    policy = Policy(data=[str(rows)], data_changes="accept")
    one = text(tmp_path)
    one.current(policy)
    rows.write_text(B)
    assert [row.response for row in one.current(policy).rows] == ["two"]
    strict = Policy(data=[str(rows)])
    assert text(tmp_path).current(strict).digest == one.current(policy).digest


def test_another_run_pins_anew(tmp_path: Path, rows: Path) -> None:
    policy = Policy(data=[str(rows)])
    text(tmp_path).current(policy)
    rows.write_text(B)
    assert text(tmp_path, "bb").current(policy).rows


def test_other_paths_with_the_same_rows_are_the_same_text(tmp_path: Path, rows: Path) -> None:
    packed = rows.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    one = text(tmp_path)
    first = one.current(Policy(data=[str(rows)]))
    assert one.current(Policy(data=[str(packed)])).digest == first.digest


def test_a_file_that_appears_in_a_folder_or_pattern_is_seen(tmp_path: Path, rows: Path) -> None:
    sources = [str(rows.parent), f"{rows.parent}/*.jsonl"]
    before = [fingerprint([source]) for source in sources]
    rows.with_name("more.jsonl").write_text(A)
    assert all(fingerprint([s]) != old for s, old in zip(sources, before, strict=True))


def test_text_that_cannot_be_read(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(ConfigError, match="names no text"):
        text(tmp_path).current(Policy())
    with pytest.raises(DataError, match="no such file"):
        text(tmp_path).current(Policy(data=[str(rows) + "x"]))
    rows.write_text("{")
    with pytest.raises(DataError, match="line 1"):
        text(tmp_path).current(Policy(data=[str(rows)]))


@pytest.mark.parametrize("pin", ["", "{}", '{"format": 2, "run": "aa", "digest": "x"}'])
def test_a_damaged_pin_is_named(tmp_path: Path, rows: Path, pin: str) -> None:
    (tmp_path / TEXT).write_text(pin)
    with pytest.raises(JournalError, match="text.json is damaged"):
        text(tmp_path).current(Policy(data=[str(rows)]))


def test_order_split_and_borders_count_in_the_digest() -> None:
    def row(prompt: str, response: str, split: str = "", client: str = "c") -> Row:
        return Row(client, prompt, response, split, "")

    lists = [
        [row("a", "b"), row("c", "d")],
        [row("c", "d"), row("a", "b")],
        [row("a", "b")],
        [row("", "ab")],
        [row("a", "b", "test")],
        [],
    ]
    assert len({text_digest(rows) for rows in lists}) == len(lists)
    assert text_digest([row("a", "b", client="x")]) == text_digest([row("a", "b")])
