"""The event log: one JSON line an event, whole again after a crash, clear about a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meadow.errors import StorageError
from meadow.events import FORMAT, Event, EventLog, tee


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
