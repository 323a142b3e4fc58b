"""The outbox gives identical bytes until it is told that they arrived."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client.outbox import Outbox
from meadow.errors import FormatError, JournalError

RUN = "0123abcd"


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path, "ada", RUN)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_nothing_is_known_at_first(outbox: Outbox, tmp_path: Path) -> None:
    assert outbox.pending(1) is None and outbox.memory(1) is None
    outbox.acknowledge(1)
    assert files(tmp_path) == []


def test_a_record_outlives_the_object(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"payload", b"memory")
    again = Outbox(tmp_path, "ada", RUN)
    assert again.pending(1) == b"payload" and again.pending(2) is None
    assert again.memory(2) == b"memory" and again.memory(1) is None


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=50), st.binary(max_size=50))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, payload: bytes, memory: bytes) -> None:
    outbox = Outbox(tmp_path_factory.mktemp("outbox"), "é/../\n", RUN)
    outbox.record(3, payload, memory)
    assert outbox.pending(3) == payload and outbox.memory(4) == memory


def test_memory_is_that_of_the_newest_round_before(outbox: Outbox) -> None:
    for number in (2, 5, 9):
        outbox.record(number, b"payload", b"memory %d" % number)
    assert [outbox.memory(number) for number in (2, 3, 5, 6, 100)] == [
        None, b"memory 2", b"memory 2", b"memory 5", b"memory 9",
    ]  # fmt: skip


def test_an_answer_is_final(outbox: Outbox) -> None:
    outbox.record(1, b"payload", b"memory")
    outbox.record(1, b"payload", b"memory")
    with pytest.raises(ValueError, match="has its answer already"):
        outbox.record(1, b"payloa", b"dmemory")
    assert outbox.pending(1) == b"payload"


def test_acknowledging_drops_what_is_older_and_drafts(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"one", b"memory 1")
    outbox.record(2, b"two", b"memory 2")
    (path,) = (path for path in files(tmp_path) if path.name.startswith("00000001"))
    path.with_name(path.name + ".draft").write_bytes(b"half")
    outbox.acknowledge(2)
    assert [path.name for path in files(tmp_path)] == ["00000002.record"]
    assert outbox.pending(1) is None
    assert outbox.pending(2) == b"two"  # a lost receipt costs nothing
    assert outbox.memory(3) == b"memory 2"


def test_clients_and_runs_do_not_meet(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"payload", b"memory")
    assert Outbox(tmp_path, "bob", RUN).pending(1) is None
    assert Outbox(tmp_path, "ada", "ffff").pending(1) is None


def test_a_record_of_someone_else_is_refused(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"payload", b"memory")
    bob = Outbox(tmp_path, "bob", RUN)
    bob.record(1, b"payload", b"memory")
    first, second = files(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for swapped in (outbox, bob):
        with pytest.raises(JournalError, match="damaged"):
            swapped.pending(1)


@pytest.mark.parametrize("run_id", ["", "../x", "ABC", "a" * 65, "a\n"])
def test_a_run_id_names_no_other_folder(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(FormatError, match="hexadecimal"):
        Outbox(tmp_path, "ada", run_id)


def test_damage_anywhere_is_found(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"payload", b"memory")
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((JournalError, FormatError), match=path.name):
            outbox.pending(1)
        path.write_bytes(whole[:place])
        with pytest.raises(JournalError, match="damaged"):
            outbox.memory(2)


def test_another_format_is_refused_by_name(outbox: Outbox, tmp_path: Path) -> None:
    outbox.record(1, b"payload", b"memory")
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"meadow outbox 1", b"meadow outbox 2"))
    with pytest.raises(FormatError, match="outbox format 2, this meadow reads 1"):
        outbox.pending(1)
