"""A run that stops at any step of any disk, in any way, ends as if it had never stopped.

A small federation (clients with memory, one that sends NaN, a coordinator that prunes) runs over
Journal and Outbox.  Every primitive step that its disks take is numbered.  The run is then ended
at each number in each way that tests/helpers/faulty_disk.py knows, and started again with the same
command.

Each payload carries a random number, so that an answer computed twice is never mistaken for one
that was sent twice.  Run as a program, this file is the long tier's child process: there SIGKILL
ends the run.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pytest
import torch
from crashes import Run, interrupt, kill_at_every_step, said_by, steps
from faulty_disk import Faulty, Numbered

from meadow.client.outbox import Outbox
from meadow.errors import JournalError, UpdateError
from meadow.journal import Journal, RunIdentity
from meadow.store import Disk
from meadow.wire import decode, encode, require_finite

IDENTITY = RunIdentity("config", "base", {"torch": "2.13"})
COHORTS = {1: ("bob", "eve"), 2: ("bob", "ada")}  # eve sends NaN; only bob comes back
HONEST = ("bob", "ada")


# The federation


@dataclass
class Ledger:
    """What outlives every crash: the answers that were recorded, and the receipts given."""

    recorded: dict[tuple[int, str], bytes] = field(default_factory=dict)
    receipts: list[tuple[int, str]] = field(default_factory=list)


class Clients(NamedTuple):
    folder: Path
    disk: Disk


def answer(client: str, number: int, state: bytes, memory: bytes | None) -> tuple[bytes, bytes]:
    """A client's momentum step: payload and new memory."""
    x = decode(state)[0]["x"]
    momentum = decode(memory)[0]["m"] if memory else torch.zeros(3)
    momentum = 0.9 * momentum + torch.sin(x * (1 + len(client)) + ord(client[0]) + number)
    sent = momentum if client in HONEST else torch.full((3,), float("nan"))
    return encode({"u": sent}, {"nonce": secrets.token_hex(8)}), encode({"m": momentum}, None)


def participate(outbox: Outbox, client: str, number: int, state: bytes, ledger: Ledger) -> bytes:
    """A client's whole round: the recorded answer, or a new one that is recorded first."""
    payload = outbox.pending(number)
    if payload is None:
        payload, memory = answer(client, number, state, outbox.memory(number))
        outbox.record(number, payload, memory)
    assert ledger.recorded.setdefault((number, client), payload) == payload
    return payload


def play(journal: Journal, state: bytes, number: int, clients: Clients, ledger: Ledger) -> None:
    """One round, from wherever it was left."""
    if journal.current() is None:
        journal.open_round(number, COHORTS[number])
    done = journal.contributions(number).keys() | journal.refusals(number).keys()
    for client in COHORTS[number]:
        outbox = Outbox(clients.folder, client, journal.run_id, clients.disk)
        if client not in done:
            payload = participate(outbox, client, number, state, ledger)
            try:
                require_finite(decode(payload, expect={"u": (3,)})[0], client)
            except UpdateError as error:
                journal.refuse(number, client, str(error))
            else:
                if journal.receive(number, client, payload):
                    ledger.receipts.append((number, client))
        outbox.acknowledge(number)
    x = decode(state)[0]["x"]
    for digest in journal.contributions(number).values():
        x = x - 0.1 * decode(journal.payload(digest))[0]["u"]
    journal.close_round(number, encode({"x": x}, None), {"norm": float(x.norm())})


def federate(root: Path, server: Disk, client: Disk, ledger: Ledger) -> bytes:
    """The command that is given again and again; the final state."""
    with Journal.open(root / "run", IDENTITY, server) as journal:
        if journal.last() is None:
            journal.close_round(0, encode({"x": torch.arange(3.0)}, None), {})
        while True:
            journal.prune(1)
            number, state = journal.last() or (0, b"")
            if number == len(COHORTS):
                journal.note("finished", True)
                return state
            play(journal, state, number + 1, Clients(root / "outboxes", client), ledger)


# The proof


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("uninterrupted")
    return federate(root, Numbered(root), Numbered(root), Ledger())


def sides(disk: Numbered, side: str) -> tuple[Disk, Disk]:
    """The coordinator's disk and the clients', of which `side` has `disk`."""
    other = Numbered(disk.root)
    return (
        disk if side in ("server", "both") else other,
        disk if side in ("client", "both") else other,
    )


def run_of(ledger: Ledger, side: str = "both") -> Run:
    """The command, with the disk that is given for `side`."""
    return lambda root, disk: federate(root, *sides(disk, side), ledger)


def finish(root: Path, ledger: Ledger, expected: bytes) -> None:
    """Give the same command again, and check that nothing shows."""
    assert federate(root, Numbered(root), Numbered(root), ledger) == expected
    assert len(ledger.receipts) == len(set(ledger.receipts))
    with Journal.open(root / "run", IDENTITY, Numbered(root)) as journal:
        assert [metrics["round"] for metrics in journal.metrics()] == [0, *COHORTS]
        assert journal.get("finished") is True
        assert [list(journal.contributions(number)) for number in COHORTS] == [["bob"], [*HONEST]]
        assert [list(journal.refusals(number)) for number in COHORTS] == [["eve"], []]
        assert not list((root / "run").rglob("*.draft"))
        assert len(list((root / "run" / "blobs").iterdir())) == 1 + len(HONEST)


@pytest.mark.parametrize(
    "way", ["before", "torn", "power", "full", pytest.param("after", marks=pytest.mark.long)]
)
def test_any_step(tmp_path: Path, roots: Iterator[Path], expected: bytes, way: str) -> None:
    places = steps(run_of(Ledger()), tmp_path / "count", way)
    assert len(places) >= (15 if way == "torn" else 60)
    for at, root in zip(places, roots, strict=False):
        ledger = Ledger()
        finish(interrupt(run_of(ledger), Faulty(root, at, way)), ledger, expected)


@pytest.mark.parametrize("side", ["server", "client"])
def test_one_machine_loses_power(
    tmp_path: Path, roots: Iterator[Path], expected: bytes, side: str
) -> None:
    """The other machine keeps all that it wrote: neither may know what the other forgot."""
    places = steps(run_of(Ledger(), side), tmp_path / "count")
    for at, root in zip(places, roots, strict=False):
        ledger = Ledger()
        finish(interrupt(run_of(ledger, side), Faulty(root, at, "power")), ledger, expected)


def killed_then_cut(root: Path, first: int, second: int, ledger: Ledger) -> Path:
    """A process dies, and soon after its successor has started the power fails."""
    killed = Faulty(root, first, "before")
    cut = Faulty(interrupt(run_of(ledger), killed), second, "power", killed.undo)
    return interrupt(run_of(ledger), cut)


@pytest.mark.parametrize(
    "seconds",
    [(5,), pytest.param((1, 2, 3, 4, 6, 8, 11, 15, 20), marks=pytest.mark.long)],
    ids=["few", "many"],
)
def test_a_power_cut_after_a_crash(
    tmp_path: Path, roots: Iterator[Path], expected: bytes, seconds: tuple[int, ...]
) -> None:
    """What a predecessor wrote but did not sync is not taken for durable."""
    firsts = steps(run_of(Ledger()), tmp_path / "count")[:-24]
    pairs = [(first, second) for first in firsts for second in seconds]
    for (first, second), root in zip(pairs, roots, strict=False):
        ledger = Ledger()
        finish(killed_then_cut(root, first, second, ledger), ledger, expected)


class NeverSyncsContent(Faulty):
    def sync(self, file: BinaryIO) -> None:
        self.step(lambda: None)


class NeverSyncsNames(Faulty):
    def sync_folder(self, folder: Path) -> None:
        self.step(lambda: None)


@pytest.mark.parametrize("careless", [NeverSyncsContent, NeverSyncsNames])
def test_a_careless_disk_would_be_noticed(
    tmp_path: Path, roots: Iterator[Path], expected: bytes, careless: type[Faulty]
) -> None:
    """The proof has teeth: leave out either fsync, and some step ends in a loss."""
    noticed = False
    places = steps(run_of(Ledger()), tmp_path / "count")[30::5]
    for at, root in zip(places, roots, strict=False):
        ledger = Ledger()
        survivor = interrupt(run_of(ledger), careless(root, at, "power"))
        try:
            finish(survivor, ledger, expected)
        except (AssertionError, JournalError):
            noticed = True
    assert noticed


@pytest.mark.long
def test_sigkill_at_any_step(tmp_path: Path, expected: bytes) -> None:
    (tmp_path / "expected").write_bytes(expected)
    assert int(said_by(__file__, str(tmp_path))) > 75


def main(folder: Path) -> int:
    expected = (folder / "expected").read_bytes()

    def run(root: Path, disk: Disk) -> None:
        federate(root, disk, disk, Ledger())

    return kill_at_every_step(folder, run, lambda root: finish(root, Ledger(), expected))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(str(main(Path(sys.argv[1]))))
