"""The store gives back what it was given, in order, and never lets a number be signed twice."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from meadow.client.record_store import Entry, Kind, RecordStore, owner_of
from meadow.errors import FormatError, JournalError

RUN, OWN, OTHER = b"r" * 32, b"o" * 32, b"x" * 32
Open = Callable[[], RecordStore]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "peer"


@pytest.fixture
def store(folder: Path) -> Iterator[RecordStore]:
    with RecordStore.open(folder, RUN, OWN) as store:
        yield store


def entry(
    number: int, kind: Kind = "record", peer: bytes = OTHER, sequence: int | None = None
) -> Entry:
    digest = number.to_bytes(32, "little")
    return Entry(kind, digest, peer, number if sequence is None else sequence, b"data%d" % number)


def own(number: int, sequence: int | None = None) -> Entry:
    return entry(number, peer=OWN, sequence=sequence)


def change(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "records.db", isolation_level=None)) as database:
        assert database.execute(statement).rowcount != 0


def test_entries_outlive_the_object_in_order(folder: Path) -> None:
    entries = [entry(n, kind) for n in (5, 3, 9) for kind in ("record", "proof")]
    with RecordStore.open(folder, RUN, OWN) as store:
        assert store.append(entries[:4]) == 4
        assert store.append(entries[2:]) == 2
        assert store.append([]) == 0
    with RecordStore.open(folder, RUN, OWN) as store:
        assert list(store.entries()) == entries
        assert list(store.entries("proof")) == entries[1::2]
        assert store.count("proof") == 3 and store.count("checkpoint") == 0
        assert store.get("proof", entry(3).digest) == entries[3]
        assert store.get("introduction", entry(3).digest) is None


def test_of_equal_keys_the_first_stays(store: RecordStore) -> None:
    again = Entry("record", entry(1).digest, OTHER, 1, b"other signature")
    assert store.append([entry(1)]) == 1
    assert store.append([again, entry(2), again]) == 1
    assert list(store.entries()) == [entry(1), entry(2)]


def test_replacing_is_one_step_and_order_stays(store: RecordStore) -> None:
    store.append([entry(n) for n in range(4)])
    proof = entry(7, "proof")
    store.replace([entry(3).key, entry(1).key, ("proof", b"unknown")], [proof])
    store.append([entry(1)])
    assert list(store.entries()) == [entry(0), entry(2), proof, entry(1)]


def test_iteration_reads_page_by_page_while_others_write(store: RecordStore) -> None:
    store.append([entry(n) for n in range(1200)])
    seen = []
    for number, found in enumerate(store.entries()):
        seen.append(found)
        if number == 600:
            store.replace([entry(10).key, entry(1100).key], [entry(1200)])
    assert seen == [entry(n) for n in range(1201) if n != 1100]


def test_threads_share_a_store(store: RecordStore) -> None:
    batches = [[entry(n) for n in range(start, start + 5)] for start in range(0, 100, 5)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(store.append, batches)) == [5] * 20
    found = list(store.entries())
    assert sorted(e.sequence for e in found) == list(range(100))
    assert [found[at : at + 5] in batches for at in range(0, 100, 5)] == [True] * 20


def test_a_number_is_signed_once(folder: Path) -> None:
    with RecordStore.open(folder, RUN, OWN) as store:
        assert store.signed() is None
        store.append_own(own(0))
        store.append_own(own(1))
    with RecordStore.open(folder, RUN, OWN) as store:
        assert store.signed() == 1
        for number in (0, 1):
            with pytest.raises(JournalError, match="has signed its record"):
                store.append_own(own(50 + number, sequence=number))
        store.append_own(own(2))
        assert [e.sequence for e in store.entries()] == [0, 1, 2]


def test_dropped_and_returned_records_stay_signed(folder: Path) -> None:
    """An own record that only others had kept, and one that was dropped here, count as well."""
    with RecordStore.open(folder, RUN, OWN) as store:
        store.append([entry(90), own(4)])
        assert store.signed() == 4
        store.append([own(2), entry(91, "proof", OWN)])
        store.replace([own(4).key, own(2).key])
    with RecordStore.open(folder, RUN, OWN) as store:
        assert store.signed() == 4 and store.count("record") == 1
        with pytest.raises(JournalError, match="has signed"):
            store.append_own(own(3))
        store.replace((), [own(8)])
        assert store.signed() == 8


def test_only_own_records_are_signed(store: RecordStore) -> None:
    for wrong in (entry(1), entry(1, "proof", OWN)):
        with pytest.raises(ValueError, match="this peer's own"):
            store.append_own(wrong)
    assert store.signed() is None and list(store.entries()) == []


@pytest.mark.parametrize("sequence", [-1, 2**63])
def test_impossible_entries_leave_nothing(store: RecordStore, sequence: int) -> None:
    with pytest.raises(ValueError, match="no entry can be"):
        store.append([entry(1), entry(2, sequence=sequence)])
    with pytest.raises(ValueError, match="no entry can be 'secret'"):
        store.append([entry(1), Entry("secret", b"", b"", 0, b"")])  # type: ignore[arg-type]
    assert list(store.entries()) == []
    store.append([entry(1, sequence=2**63 - 1)])


def test_one_process_at_a_time(folder: Path, store: RecordStore) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from meadow.client.record_store import RecordStore\n"
        "from meadow.errors import JournalError\n"
        "try: RecordStore.open(Path(sys.argv[1]), b'r' * 32, b'o' * 32)\n"
        "except JournalError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "another process is working in" in done.stderr
    store.close()
    RecordStore.open(folder, RUN, OWN).close()


@pytest.mark.parametrize(
    ("run", "peer", "says"), [(b"s" * 32, OWN, "another run"), (RUN, OTHER, "another peer")]
)
def test_a_folder_belongs_to_one_run_and_peer(
    folder: Path, run: bytes, peer: bytes, says: str
) -> None:
    RecordStore.open(folder, RUN, OWN).close()
    with pytest.raises(JournalError, match=says):
        RecordStore.open(folder, run, peer)
    RecordStore.open(folder, RUN, OWN).close()


def test_another_format_is_refused_by_name(folder: Path) -> None:
    RecordStore.open(folder, RUN, OWN).close()
    change(folder, "PRAGMA user_version = 2")
    with pytest.raises(FormatError, match="has record store format 2, this meadow reads 1"):
        RecordStore.open(folder, RUN, OWN)


def test_another_program_s_database_is_refused(folder: Path) -> None:
    folder.mkdir()
    change(folder, "CREATE TABLE things (name)")
    with pytest.raises(FormatError, match="format 0"):
        RecordStore.open(folder, RUN, OWN)


@pytest.mark.parametrize("statement", ["", "CREATE TABLE facts (key, value)", "CREATE TABLE x (y)"])
def test_a_database_of_nobody_is_refused_by_name(folder: Path, statement: str) -> None:
    """A file that a crash, or a copy, left empty is one."""
    folder.mkdir()
    change(folder, statement)
    with pytest.raises(JournalError, match="does not say whose it is"):
        owner_of(folder)


@pytest.mark.parametrize(
    "what",
    ["data = x'00'", "sequence = 7", "peer = x'00'", "digest = x'00'", "kind = 'checkpoint'"],
)
def test_a_damaged_entry_is_named(folder: Path, what: str) -> None:
    with RecordStore.open(folder, RUN, OWN) as store:
        store.append([entry(1), entry(2), entry(3)])
    change(folder, f"UPDATE entries SET {what} WHERE place = 2")
    with RecordStore.open(folder, RUN, OWN) as store:
        found = store.entries()
        with pytest.raises(JournalError, match="damaged at entry 2"):
            list(found)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    with RecordStore.open(folder, RUN, OWN) as store:
        store.append([entry(n) for n in range(100)])
    raw = bytearray((folder / "records.db").read_bytes())
    raw[4096 * 2 :] = bytes(len(raw) - 4096 * 2)
    (folder / "records.db").write_bytes(raw)
    with pytest.raises(JournalError, match="damaged"):
        RecordStore.open(folder, RUN, OWN)


def test_what_a_killed_process_had_logged_is_durable_before_it_is_read(
    folder: Path, tmp_path: Path, store: RecordStore
) -> None:
    """The log may be in the system's memory only: opening writes it into the database."""
    store.append_own(own(0))
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    log = killed / "records.db-wal"
    assert log.stat().st_size > 0
    with RecordStore.open(killed, RUN, OWN) as after:
        assert log.stat().st_size == 0
        assert list(after.entries()) == [own(0)] and after.signed() == 0


class AgainstAModel(RuleBasedStateMachine):
    """A list in memory, and the store: equal after any sequence of calls and restarts."""

    numbers = st.integers(0, 12)
    kinds = st.sampled_from(["record", "introduction", "proof", "checkpoint"])
    entry_ = st.builds(entry, numbers, kinds, st.sampled_from([OWN, OTHER]), st.integers(0, 6))

    @initialize()
    def begin(self) -> None:
        self.root = TemporaryDirectory()
        self.entries: list[Entry] = []
        self.mark = -1
        self.store = self.open()

    def open(self) -> RecordStore:
        return RecordStore.open(Path(self.root.name) / "peer", RUN, OWN)

    def keep(self, entries: list[Entry]) -> int:
        before = len(self.entries)
        for new in entries:
            if new.key not in {old.key for old in self.entries}:
                self.entries.append(new)
            if new.kind == "record" and new.peer == OWN:
                self.mark = max(self.mark, new.sequence)
        return len(self.entries) - before

    @rule(entries=st.lists(entry_, max_size=5))
    def append(self, entries: list[Entry]) -> None:
        assert self.store.append(entries) == self.keep(entries)

    @rule(number=st.integers(100, 200), sequence=st.integers(0, 12))
    def append_own(self, number: int, sequence: int) -> None:
        record = own(number, sequence)
        if sequence > self.mark:
            self.store.append_own(record)
            self.keep([record])
        else:
            with pytest.raises(JournalError):
                self.store.append_own(record)

    @rule(drop=st.lists(entry_, max_size=5), put=st.lists(entry_, max_size=3))
    def replace(self, drop: list[Entry], put: list[Entry]) -> None:
        keys = [old.key for old in drop]
        self.store.replace(keys, put)
        self.entries = [old for old in self.entries if old.key not in keys]
        self.keep(put)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.open()

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def equal(self) -> None:
        assert list(self.store.entries()) == self.entries
        assert self.store.signed() == (None if self.mark < 0 else self.mark)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.root.cleanup()


def test_against_a_model() -> None:
    run_state_machine_as_test(
        AgainstAModel, settings=settings(max_examples=25, stateful_step_count=15, deadline=None)
    )
