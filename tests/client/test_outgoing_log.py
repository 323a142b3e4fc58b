"""The log of what left: nothing in it can be changed unnoticed, and no crash breaks its chain."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from appending_disk import Appending
from faulty_disk import Crash, Numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client.outgoing_log import HEAD, Entry, OutgoingLog, line_of, read, verify
from meadow.errors import FormatError, JournalError, StorageError
from meadow.store import Disk, digest_of

RUN = "0123abcd"


def open_log(folder: Path, disk: Disk | None = None, now: float = 1000.0) -> OutgoingLog:
    return OutgoingLog(folder / "outgoing.jsonl", disk or Numbered(folder), lambda: now)


def add(log: OutgoingLog, data: bytes, round: int = 1, **more: object) -> Entry:
    about = {"notes": {"loss": 1.5}, **more}
    return log.append("train", data, run=RUN, round=round, received=10, about=about)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of three entries."""
    log = open_log(tmp_path)
    for round in (1, 2, 3):
        log.append("train", b"answer %d" % round, run="ab", round=round, received=10, about={})
    return log.path


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A log of two entries, a first and a last one, for tests that spoil each byte."""
    log = open_log(tmp_path)
    for round in (1, 2):
        log.append("train", b"", run="ab", round=round, received=1, about={})
    return log.path


def put(path: Path, data: bytes) -> None:
    """In place: much quicker than a new file where thousands are tried."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


SHOWS = "was changed, cut or moved|was torn by a crash|has format"


def broken(path: Path, match: str = SHOWS) -> None:
    with pytest.raises((JournalError, FormatError), match=match):
        read(path)


def test_an_entry_holds_what_left(path: Path) -> None:
    entries = read(path)
    assert [e.number for e in entries] == [1, 2, 3] and verify(path) == 3
    assert [e.sha256 for e in entries] == [digest_of(b"answer %d" % n) for n in (1, 2, 3)]
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in lines[1:]] == list(map(digest_of, lines[:-1]))
    first = entries[0]
    assert (first.bytes, first.received, first.repeat, first.time) == (8, 10, False, 1000.0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_changed_byte_shows(short: Path) -> None:
    for file in (short, short.with_name(short.name + HEAD)):
        whole = file.read_bytes()
        for at in range(len(whole)):
            for byte in (whole[at] ^ 1, 10):
                if byte != whole[at]:
                    put(file, whole[:at] + bytes([byte]) + whole[at + 1 :])
                    broken(short)
        put(file, whole)
    assert verify(short) == 2


def test_every_cut_and_every_byte_that_is_taken_out_or_put_in_shows(short: Path) -> None:
    whole = short.read_bytes()
    for at in range(len(whole)):
        for text in (whole[:at], whole[:at] + whole[at + 1 :], whole[:at] + b"0" + whole[at:]):
            put(short, text)
            broken(short)


def test_lines_cannot_be_reordered_repeated_or_dropped(path: Path) -> None:
    one, two, three = path.read_bytes().splitlines(keepends=True)
    for lines in ((two, one, three), (one, three, two), (one, one, two, three), (one, three),
                  (one, two), (two, three), (one, two, three, three), ()):  # fmt: skip
        path.write_bytes(b"".join(lines))
        broken(path)


def test_a_head_that_is_gone_or_older_shows(path: Path) -> None:
    head = path.with_name(path.name + HEAD)
    old = head.read_bytes()
    add(open_log(path.parent), b"answer 4", 4)
    head.write_bytes(old)
    broken(path)
    head.unlink()
    broken(path)


def test_a_log_that_is_gone_shows(path: Path) -> None:
    path.unlink()
    broken(path, "is missing")
    with pytest.raises(JournalError, match="is missing"):
        open_log(path.parent)


def test_a_forger_of_both_files_is_found_by_who_noted_the_head(path: Path) -> None:
    noted = open_log(path.parent).head
    for file in (path, path.with_name(path.name + HEAD)):
        file.unlink()
    assert verify(path := forged(path.parent)) == 3
    with pytest.raises(JournalError, match="does not continue the log whose head was"):
        verify(path, noted)


def forged(folder: Path) -> Path:
    log = open_log(folder)
    for round in (1, 2, 3):
        add(log, b"answer x", round)
    return log.path


def test_an_earlier_head_is_still_held(path: Path) -> None:
    noted = open_log(path.parent).head
    log = open_log(path.parent)
    add(log, b"answer 4", 4)
    assert verify(path, noted) == 4 == verify(path, log.head)
    assert verify(path, "0" * 64) == 4  # noted before the first entry


def test_another_format_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2', 1))
    with pytest.raises(FormatError, match="line 1 has format 2, this meadow reads 1"):
        read(path)


def test_repeats_and_totals_are_known_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        log = open_log(tmp_path)
        add(log, b"answer")
    assert [e.repeat for e in read(log.path)] == [False, True]
    assert not add(log, b"another").repeat and not add(log, b"answer", 2).repeat
    refusal = log.append("refusal", b"no", run=RUN, round=2, received=99, about={})
    assert not refusal.repeat
    again = open_log(tmp_path)
    for one in (log, again):
        assert (one.sent(RUN, 1), one.received(RUN, 1)) == (6 + 6 + 7, 30)
        assert (one.sent(RUN, 2), one.received(RUN, 2)) == (6, 109)
        assert one.sent("ffff", 1) == 0


def test_rounds_are_counted_from_when_they_were_first_trained(tmp_path: Path) -> None:
    for round, now in ((1, 100.0), (2, 200.0), (1, 300.0)):
        add(open_log(tmp_path, now=now), b"answer", round)
    log = open_log(tmp_path)
    log.append("evaluate", b"loss", run=RUN, round=3, received=1, about={})
    nobody = ("", 0)
    assert [log.rounds_since(t, nobody) for t in (0, 100, 199.9, 200)] == [2, 1, 1, 0]
    assert log.rounds_since(0, (RUN, 1)) == 1


# Crashes


def play(folder: Path, disk: Disk, answers: int = 4) -> list[bytes]:
    """Answers that were noted, and so could leave, before the disk failed."""
    left = []
    log = open_log(folder, disk)
    for number in range(answers):
        add(log, b"answer %d" % number, number)
        left.append(b"answer %d" % number)
    return left


@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_nothing_leaves_that_the_log_does_not_hold(tmp_path: Path, way: str) -> None:
    counted = Numbered(tmp_path / "count")
    counted.root.mkdir()
    play(counted.root, counted)
    torn = 0
    for at in range(1, counted.count + 1):
        root = tmp_path / str(at)
        root.mkdir()
        left: list[bytes] = []
        disk = Appending(root, at, way)
        try:
            log = open_log(root, disk)
            for number in range(4):
                add(log, b"answer %d" % number, number)
                left.append(b"answer %d" % number)
        except (Crash, StorageError):
            pass
        folder = root if way == "full" else disk.survivor
        torn += is_torn(folder / "outgoing.jsonl")
        again = open_log(folder)
        held = [entry.sha256 for entry in read(again.path)]
        assert held[: len(left)] == [digest_of(data) for data in left]
        assert len(held) <= len(left) + 1  # what was noted and did not leave
        play(folder, Numbered(folder))
        assert verify(again.path) == len(held) + 4
        shutil.rmtree(root)
    assert torn or way == "after"  # a line was mended, not only whole ones found


def is_torn(path: Path) -> bool:
    try:
        read(path)
    except JournalError as error:
        return "was torn by a crash" in str(error)
    return False


@pytest.mark.parametrize("at", range(5, 17))
def test_a_full_disk_refuses_and_the_same_log_goes_on(tmp_path: Path, at: int) -> None:
    """Space returns; what was refused is in the log, and is a repeat when it leaves at last."""
    log = open_log(tmp_path, disk := Appending(tmp_path, at, "full"))
    refused = 0
    for number in (0, 1):
        try:
            add(log, b"answer", number)
        except StorageError:
            refused += 1
            add(log, b"answer", number)
    assert refused == (at <= disk.count) == 1
    held = read(log.path)
    assert {e.round for e in held} == {0, 1} and verify(log.path) in (2, 3)
    assert log.head == digest_of(line_of(held[-1]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_a_crash_leaves_of_a_line_is_completed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Its beginning, zeros where its end should be, or nothing of it."""
    log = open_log(folder := tmp_path_factory.mktemp("torn"))
    for round in (1, 2):
        add(log, b"answer", round, text=data.draw(st.text(max_size=20)))
    whole = log.path.read_bytes()
    start = whole.index(b"\n") + 1
    kept = data.draw(st.integers(start, len(whole)))
    zeros = data.draw(st.integers(0, len(whole) - kept))
    log.path.write_bytes(whole[:kept] + bytes(zeros))
    open_log(folder)
    assert log.path.read_bytes() == whole


def test_a_reader_never_sees_half_an_entry(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    done = threading.Event()
    seen, faults = set[int](), list[Exception]()

    def watch() -> None:
        try:
            while not done.is_set():
                seen.add(verify(log.path))
            seen.add(verify(log.path))
        except Exception as error:
            faults.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    for number in range(60):
        add(log, b"answer", number)
    done.set()
    reader.join()
    assert not faults and max(seen) == 60
