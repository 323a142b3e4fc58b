"""A peer that stops at any step of its disk, in any way, never signs a number twice.

A peer signs a chain of records, keeps each before it sends it, takes in records of others and
drops some.  Every primitive step that its disk takes is numbered; the peer is ended at each number
in each way that tests/helpers/faulty_disk.py knows, and started again.

Each record carries a random number, as a signature over fresh data would, so that a record made
twice is never mistaken for one that was sent twice.  Run as a program, this file is the long
tier's child process: there SIGKILL ends the peer.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from crashes import interrupt, kill_at_every_step, said_by, steps
from faulty_disk import Faulty, Numbered

from meadow.client.record_store import Entry, RecordStore
from meadow.store import Disk

RUN, OWN, OTHER = b"r" * 32, b"o" * 32, b"x" * 32
LENGTH = 5  # own records


@dataclass
class World:
    """What outlives every crash: what the other peers have of this one, and what it was given."""

    received: dict[int, bytes] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)  # numbers of others' records that it confirmed
    dropped: set[int] = field(default_factory=set)

    def receive(self, record: Entry) -> None:
        """Another peer would prove two records of one number to be a fraud."""
        assert self.received.setdefault(record.sequence, record.data) == record.data


def signed(sequence: int, previous: bytes) -> Entry:
    data = previous + secrets.token_bytes(16)
    return Entry("record", hashlib.sha256(data).digest(), OWN, sequence, data)


def others(number: int) -> list[Entry]:
    return [
        Entry("record", bytes([number, i]) + bytes(30), OTHER, 2 * number + i, b"%d" % number)
        for i in range(2)
    ]


def participate(root: Path, disk: Disk, world: World) -> list[Entry]:
    """The command that is given again and again: go on with the chain until it is long enough."""
    with RecordStore.open(root / "peer", RUN, OWN, disk) as store:
        chain = [entry for entry in store.entries("record") if entry.peer == OWN]
        for record in chain:
            world.receive(record)  # whether it was sent before is not known
        while len(chain) < LENGTH:
            extend(store, chain, world)
        return list(store.entries())


def extend(store: RecordStore, chain: list[Entry], world: World) -> None:
    """Take in a batch of others' records, drop the first of an earlier one, sign and send."""
    number = len(chain)
    store.append(others(number))
    world.kept.add(number)
    store.replace([others(number // 2)[0].key])
    world.dropped.add(number // 2)
    mark = store.signed()
    record = signed(0 if mark is None else mark + 1, chain[-1].digest if chain else bytes(32))
    store.append_own(record)
    world.receive(record)
    chain.append(record)


def finish(root: Path, world: World) -> None:
    """Start again after the fault, and check that nothing shows."""
    promised, dropped = set(world.kept), set(world.dropped)
    with RecordStore.open(root / "peer", RUN, OWN, Numbered(root)) as store:
        found = {entry.key for entry in store.entries()}
    for number in promised:
        assert others(number)[1].key in found
        assert others(number)[0].key not in found or number not in dropped
    participate(root, Numbered(root), world)
    check_chain(root, world)


def check_chain(root: Path, world: World) -> None:
    with RecordStore.open(root / "peer", RUN, OWN, Numbered(root)) as store:
        chain = [entry for entry in store.entries() if entry.peer == OWN]
    assert [entry.sequence for entry in chain] == list(range(LENGTH))
    assert world.received == {entry.sequence: entry.data for entry in chain}
    links = [bytes(32), *(entry.digest for entry in chain)]
    assert all(entry.data.startswith(link) for entry, link in zip(chain, links, strict=False))


@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_any_step(tmp_path: Path, roots: Iterator[Path], way: str) -> None:
    places = steps(partial(participate, world=World()), tmp_path / "count", way)
    assert len(places) >= 3 * LENGTH
    for at, root in zip(places, roots, strict=False):
        world = World()
        finish(interrupt(partial(participate, world=world), Faulty(root, at, way)), world)


def test_a_crash_after_a_crash(tmp_path: Path, roots: Iterator[Path]) -> None:
    firsts = steps(partial(participate, world=World()), tmp_path / "count", "torn")[:-3]
    pairs = [(first, second) for first in firsts for second in (1, 2, 3)]
    for (first, second), root in zip(pairs, roots, strict=False):
        world = World()
        run = partial(participate, world=world)
        survivor = interrupt(run, Faulty(root, first, "torn"))
        finish(interrupt(run, Faulty(survivor, second, "before")), world)


class SendsFirst(RecordStore):
    """What must not be: the record leaves before it is durable."""

    world: World

    def append_own(self, record: Entry) -> None:
        self.world.receive(record)
        super().append_own(record)


def test_a_peer_that_sends_first_would_be_noticed(
    tmp_path: Path, roots: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof has teeth."""
    places = steps(partial(participate, world=World()), tmp_path / "count", "torn")
    monkeypatch.setattr(f"{__name__}.RecordStore", SendsFirst)
    noticed = 0
    for at, root in zip(places, roots, strict=False):
        SendsFirst.world = world = World()
        try:
            finish(interrupt(partial(participate, world=world), Faulty(root, at, "torn")), world)
        except AssertionError:
            noticed += 1
    assert noticed == LENGTH


@pytest.mark.long
def test_sigkill_at_any_step(tmp_path: Path) -> None:
    assert int(said_by(__file__, str(tmp_path))) > 6 * LENGTH


def go_on(root: Path) -> None:
    """Start again; what was sent before is not known here, but the chain must be whole."""
    world = World()
    participate(root, Numbered(root), world)
    check_chain(root, world)


if __name__ == "__main__":
    run = partial(participate, world=World())  # of which each fork has its own
    sys.stdout.write(str(kill_at_every_step(Path(sys.argv[1]), run, go_on)))
