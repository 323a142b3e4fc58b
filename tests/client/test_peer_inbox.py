"""The inbox: each file is taken once, refused by name, or waits; nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from gossips import charter_of, identity, introduce

from meadow.client.peer_inbox import Inbox
from meadow.store import Disk
from meadow.strategies.introductions import LARGEST
from meadow.strategies.ledger import Added, Kind, Ledger
from meadow.strategies.peer_keys import peer_of

ALICE, BOB, JOE, ZOE = (identity(name) for name in ("alice", "bob", "joe", "zoe"))


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, Ledger(charter_of(ALICE, BOB))
        self.said: list[str] = []
        self.inbox = Inbox(folder, Disk(), self.publish, self.said.append)

    def publish(self, kind: Kind, data: bytes) -> Added:
        return self.ledger.add(kind, data)

    def drop(self, name: str, data: bytes) -> None:
        (self.folder / f"{name}.introduction").write_bytes(data)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_good_introduction_is_taken_and_its_file_goes(case: Case) -> None:
    case.drop("joe", introduce(ALICE, JOE))
    case.inbox.read()
    assert peer_of(JOE) in case.ledger.members and case.names == [] and case.said == []
    case.drop("again", introduce(BOB, JOE))
    case.inbox.read()
    assert case.names == [] and case.said == []


@pytest.mark.parametrize("data", [b"", b"junk", introduce(ALICE, JOE)[:-1], bytes(LARGEST + 7)])
def test_a_bad_one_is_renamed_and_told_once(case: Case, data: bytes) -> None:
    case.drop("joe", data)
    case.inbox.read()
    case.inbox.read()
    assert case.names == ["joe.refused"] and len(case.said) == 1
    assert case.said[0].startswith("joe.introduction is refused: ")
    assert (case.folder / "joe.refused").read_bytes() == data


def test_one_of_a_stranger_waits_for_the_word_that_it_is_none(case: Case) -> None:
    case.drop("a", introduce(JOE, ZOE))
    case.inbox.read()
    case.inbox.read()
    assert case.names == ["a.introduction"] and len(case.said) == 1 and "waits" in case.said[0]
    case.drop("b", introduce(ALICE, JOE))
    case.inbox.read()  # a comes before b
    case.inbox.read()
    assert case.names == [] and {peer_of(JOE), peer_of(ZOE)} <= {*case.ledger.members}


def test_one_that_cannot_be_read_is_told_once_and_holds_up_nothing(case: Case) -> None:
    (case.folder / "a.introduction").mkdir()
    case.drop("joe", introduce(ALICE, JOE))
    case.inbox.read()
    case.inbox.read()
    assert case.names == ["a.introduction"] and len(case.said) == 1
    assert "cannot be read" in case.said[0] and peer_of(JOE) in case.ledger.members


def test_a_draft_is_left_alone_and_a_missing_folder_holds_nothing(case: Case) -> None:
    (case.folder / "joe.introduction.draft").write_bytes(b"half of")
    case.inbox.read()
    assert case.names == ["joe.introduction.draft"] and case.said == []
    Inbox(case.folder / "gone", Disk(), case.publish, case.said.append).read()
