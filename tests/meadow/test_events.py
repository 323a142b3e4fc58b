"""The event log: one JSON line an event, whole again after a crash, clear about a full disk."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from meadow.errors import StorageError
from meadow.events import FORMAT, Event, EventLog, EventTail, last_events, tee


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_event_is_a_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log(Event("refused", 3, {"client": "é\n", "loss": 0.5}))
    (row,) = rows(tmp_path / "events.jsonl")  # readable before the log is closed
    time = row.pop("time")
    assert isinstance(time, float) and time > 1e9
    assert row == {"format": FORMAT, "kind": "refused", "round": 3, "client": "é\n", "loss": 0.5}
    log.close()


def test_a_log_is_continued(tmp_path: Path) -> None:
    for number in range(3):
        log = EventLog(tmp_path / "events.jsonl")
        log(Event("round_opened", number))
        log.close()
    assert [row["round"] for row in rows(tmp_path / "events.jsonl")] == [0, 1, 2]


def test_a_torn_last_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind":"round_op')
    log = EventLog(path)
    log(Event("notice", 1))
    log.close()
    torn, whole = path.read_bytes().splitlines()
    assert torn == b'{"kind":"round_op' and json.loads(whole)["kind"] == "notice"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_long_log_is_continued_without_being_read(tmp_path: Path) -> None:
    """That of a peer with a hundred others grows by ten kilobytes a record."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"{}\n" * 2**21)
    tracemalloc.start()
    EventLog(path).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18 and path.stat().st_size == 3 * 2**21


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    log = EventLog(path)
    with pytest.raises(StorageError, match=r"events.jsonl: the disk is full"):
        log(Event("notice"))
    log.close()


def test_a_folder_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="a folder is in the way"):
        EventLog(tmp_path)


def test_all_observers_are_told_in_order() -> None:
    told: list[tuple[int, Event]] = []
    event = Event("notice")
    tee(lambda e: told.append((1, e)), lambda e: told.append((2, e)))(event)
    assert told == [(1, event), (2, event)]


def test_a_tail_tells_what_is_appended_from_now_on_and_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log(Event("notice", 1, {"text": "before"}))
    tail = EventTail(path)
    assert list(tail.read()) == []
    for number in (2, 3):
        log(Event("round_opened", number, {"cohort": ["ada"]}))
    told = list(tail.read())
    assert [(event.kind, event.round) for event in told] == [
        ("round_opened", 2),
        ("round_opened", 3),
    ]
    assert told[0].data["cohort"] == ["ada"] and list(tail.read()) == []
    log.close()


def test_a_tail_may_be_there_before_the_log(tmp_path: Path) -> None:
    tail = EventTail(tmp_path / "events.jsonl")
    assert list(tail.read()) == []
    log = EventLog(tmp_path / "events.jsonl")
    log(Event("notice", 7))
    log.close()
    assert [event.round for event in tail.read()] == [7]


def test_a_line_is_told_once_it_is_whole_however_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for number in range(3):
        log(Event("notice", number, {"text": "é"}))
    log.close()
    data = path.read_bytes()
    path.write_bytes(b"")
    tail, told = EventTail(path), []
    for at in range(len(data)):
        with path.open("ab") as file:
            file.write(data[at : at + 1])
        told += [event.round for event in tail.read()]
        assert len(told) == data[: at + 1].count(b"\n")
    assert told == [0, 1, 2]


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b'"text"', b"1", b'{"kind": "notice"}', b"\xff"]
)
def test_what_is_no_event_is_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    path.write_bytes(line + b'\n{"kind": "notice", "round": 5, "time": 1.0}\n')
    assert [event.round for event in tail.read()] == [5]
    assert [event.data["time"] for event in last_events(path, 3)] == [1.0]


def test_the_newest_events_come_oldest_first(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_events(path, 3) == []
    log = EventLog(path)
    for number in range(6000):  # more than is looked at
        log(Event("notice", number, {"text": "x" * 50}))
    log.close()
    assert [event.round for event in last_events(path, 3)] == [5997, 5998, 5999]
    assert len(last_events(path, 10**6)) < 6000
