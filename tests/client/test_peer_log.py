"""What a peer tells: whole files at every moment, and notices only of changes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from meadow.client.peer_log import PeerLog
from meadow.errors import PeerError
from meadow.events import Event
from meadow.store import Disk


class Counting(Disk):
    def __init__(self) -> None:
        self.renamed = 0

    def rename(self, draft: Path, path: Path) -> None:
        self.renamed += 1
        super().rename(draft, path)


def test_status_is_whole_whoever_writes_it_meanwhile(tmp_path: Path) -> None:
    with PeerLog(tmp_path, lambda event: None, Disk()) as log:
        log.show({"writer": -1, "text": ""})

        def write(writer: int) -> None:
            for size in range(40):
                log.show({"writer": writer, "text": "x" * 200 * size})

        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in writers:
            thread.start()
        seen = set()
        while any(thread.is_alive() for thread in writers):
            seen.add(json.loads((tmp_path / "status.json").read_text())["writer"])
        for thread in writers:
            thread.join()
    assert seen <= {-1, 0, 1, 2, 3}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["events.jsonl", "status.json"]


def test_a_status_that_says_nothing_new_is_not_written(tmp_path: Path) -> None:
    disk = Counting()
    with PeerLog(tmp_path, lambda event: None, disk) as log:
        for state in ("a", "a", "b", "b", "a"):
            log.show({"state": state})
    assert disk.renamed == 3


def test_events_of_many_threads_are_one_line_each_and_seen_by_one_at_a_time(tmp_path: Path) -> None:
    busy, seen = threading.Lock(), []

    def observer(event: Event) -> None:
        assert busy.acquire(blocking=False)
        seen.append(event)
        busy.release()

    with PeerLog(tmp_path, observer, Disk()) as log:

        def tell(writer: int) -> None:
            for number in range(50):
                log.tell("record", {"writer": writer, "text": "y" * 500}, number)

        writers = [threading.Thread(target=tell, args=(number,)) for number in range(4)]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(lines) == len(seen) == 200
    assert {(line["writer"], line["round"]) for line in lines} == {
        (writer, number) for writer in range(4) for number in range(50)
    }


def test_who_answers_is_told_when_it_changes(tmp_path: Path) -> None:
    said: list[str] = []
    with PeerLog(tmp_path, lambda event: said.append(event.data["text"]), Disk()) as log:
        one, other = b"1" * 32, b"2" * 32
        for fault in (None, PeerError("is off"), PeerError("busy for 3.1 s"), None, None):
            log.heard(one, fault)
        log.heard(other, PeerError("is off too"))
        log.heard(one, PeerError("is off again"))
    assert said == ["is off", f"peer {one.hex()[:16]} answers again", "is off too", "is off again"]
