"""`meadow peer demo`: five peers on loopback, each its own process; one is killed, a sixth joins.

Every peer is `meadow peer run` in a process of its own with its own key, text and folder; nothing
is shared but the charter and the loopback interface.  One of the five has no address, so that only
it can call.  One is killed with SIGKILL in the middle and started again by the same command.  In
the end all six hold the same records and the same state, and a replay of one ledger agrees.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client.peer import CHARTER, INBOX
from ..client.peer_audit import events, replay
from ..client.peer_log import STATUS
from ..client.peer_memory import read_ledger
from ..client.peer_terms import draft
from ..client.peer_tls import certificate_of
from ..client.workbench import open_workbench
from ..config import Config, write
from ..errors import ConfigError, PeerError
from ..identity import HOME, Identity
from ..nano.corpus import PARTICIPANTS
from ..strategies.charter import Charter, Member
from ..strategies.introductions import Introduction, JoinRequest

FOUNDERS, RECORDS = 5, 6
VICTIM, OUTBOUND, LATE = 1, 4, 5
PATIENCE = 600.0  # seconds without which something is wrong
LAST_REPORT = 120.0  # seconds that a peer has to measure and export once more

CONFIG = Config().replace(
    model={"rank": 64, "alpha": 64.0, "device": "cpu"},
    data={"max_length": 128, "train_rows": 128, "held_out_rows": 8},
    strategy={"name": "fedkseed", "options": {"scale": -4}},
    clients={"batch": 4},
    peer={
        "charter": CHARTER,
        "steps": 16,
        "records": RECORDS,
        "lr": 1e-4,
        "fanout": 2,
        "sync_seconds": 1.0,
        "evaluate_every": 1,
    },
)

Phase = Callable[[str], None]


@dataclass
class Actor:
    """One peer of the demo, seen from outside: a folder and, most of the time, a process."""

    number: int
    name: str
    folder: Path
    identity: Identity
    address: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def member(self) -> Member:
        certificate = certificate_of(self.identity)
        return Member(certificate.peer, certificate.der, self.address)

    @property
    def place(self) -> Path:
        """The peer's own folder."""
        return self.folder / "peer"

    def start(self) -> None:
        command = [sys.executable, "-m", "meadow.cli", "peer", "run", "run.toml", "--out", "peer"]
        environment = {**os.environ, HOME: str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def status(self) -> dict[str, Any]:
        """What it last wrote of itself; empty before."""
        try:
            found: dict[str, Any] = json.loads((self.place / STATUS).read_text())
        except FileNotFoundError:
            return {}
        return found

    def losses(self) -> list[float]:
        """Its held-out losses, in the order in which they were measured."""
        told = (event for event in events(self.place) if event["kind"] == "measured")
        return [event["loss"] for event in told if "loss" in event]

    def checkpoint(self) -> dict[str, int] | None:
        """What it began with, if that was a checkpoint."""
        lines = (self.place / "events.jsonl").read_text().splitlines()
        for event in map(json.loads, lines):
            if event["kind"] == "checkpoint":
                return {key: event[key] for key in ("records", "bytes")}
        return None

    def check(self) -> None:
        """Raise PeerError if its process has ended by itself."""
        if self.process is not None and self.process.poll() not in (None, 0):
            tail = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            raise PeerError(f"{self.name} ended: {tail[-1] if tail else 'it said nothing'}")


def run(out: Path, phase: Phase = lambda text: None) -> dict[str, Any]:
    """The whole demo; its report.

    Raises ConfigError where `out` is not new, PeerError where a peer ended by itself or the states
    are not equal in the end.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", "name another folder with --out, or delete it")
    began = time.monotonic()
    phase("writing keys, configs and the charter")
    actors = [_actor(out.resolve(), number) for number in range(FOUNDERS)]
    charter_file = _charter(actors)
    for actor in actors:
        _equip(actor, charter_file)
    with _ended(actors):
        for actor in actors:
            actor.start()
        victim = actors[VICTIM]
        phase(f"{FOUNDERS} peers train and gossip; {victim.name} is about to be killed")
        _wait(actors, lambda: victim.status().get("own_records", 0) >= 2)
        assert victim.process is not None
        victim.process.kill()
        victim.process.wait()
        killed_at = victim.status()["own_records"]
        phase(f"killed {victim.name} (kill -9) at its record {killed_at}; a sixth peer joins")
        late = _join(out.resolve(), actors[0], charter_file)
        actors.append(late)
        late.start()
        victim.start()
        phase("waiting until all have made their records and hold everybody's")
        _wait(actors, lambda: _agreed(actors))
    report = _report(actors, killed_at, time.monotonic() - began)
    if report["states"] != [report["replayed"]]:
        raise PeerError("the peers ended with different states", f"their folders are in {out}")
    return report


def _actor(out: Path, number: int) -> Actor:
    name = PARTICIPANTS[number]
    folder = out / f"{number + 1}-{name}"
    (folder / "home").mkdir(parents=True)
    identity = Identity.load_or_create(folder / "home" / "identity.pem")
    address = "" if number == OUTBOUND else f"127.0.0.1:{_free_port()}"
    return Actor(number, name, folder, identity, address)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _charter(actors: Sequence[Actor]) -> bytes:
    members = [actor.member for actor in actors]
    charter = draft(CONFIG, open_workbench(CONFIG), members, secrets.token_hex(32))
    return charter.sign(actors[0].identity)


def _equip(actor: Actor, charter_file: bytes) -> None:
    config = CONFIG.replace(peer={"participant": actor.name, "listen": actor.address})
    (actor.folder / "run.toml").write_text(write(config), encoding="utf-8")
    (actor.folder / CHARTER).write_bytes(charter_file)


def _join(out: Path, introducer: Actor, charter_file: bytes) -> Actor:
    """A sixth peer, introduced by the first: two signatures, one file in an inbox."""
    late = _actor(out, LATE)
    _equip(late, charter_file)
    run_id = Charter.read(charter_file).run
    member = late.member
    request = JoinRequest.sign(late.identity, run_id, member.certificate, member.address)
    introduction = Introduction.sign(introducer.identity, request)
    draft = introducer.place / INBOX / "late.draft"
    draft.write_bytes(introduction.encoded)
    draft.rename(draft.with_suffix(".introduction"))
    return late


def _agreed(actors: Sequence[Actor]) -> bool:
    found = [actor.status() for actor in actors]
    done = all(status.get("own_records", 0) >= RECORDS for status in found)
    return done and {status["records"] for status in found} == {RECORDS * len(actors)}


def _wait(actors: Sequence[Actor], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        for actor in actors:
            actor.check()
        if time.monotonic() > deadline:
            raise PeerError(f"the peers did not get there in {PATIENCE:.0f} s", "see their log.txt")
        time.sleep(0.2)


@contextmanager
def _ended(actors: list[Actor]) -> Iterator[None]:
    """In the end every process is asked to stop, and killed where it does not."""
    try:
        yield
    finally:
        for actor in actors:
            _end(actor)


def _end(actor: Actor) -> None:
    if actor.process is None or actor.process.poll() is not None:
        return
    actor.process.send_signal(signal.SIGTERM)
    try:
        actor.process.wait(LAST_REPORT)
    except subprocess.TimeoutExpired:
        actor.process.kill()
        actor.process.wait()


def _report(actors: Sequence[Actor], killed_at: int, seconds: float) -> dict[str, Any]:
    first = actors[0].place
    found = replay(read_ledger(Charter.read((first / CHARTER).read_bytes()), first))
    rows = [
        {
            "name": actor.name,
            "state": actor.status()["state"],
            "records": actor.status()["own_records"],
            "first_loss": actor.losses()[0],
            "last_loss": actor.losses()[-1],
        }
        for actor in actors
    ]
    return {
        "peers": rows,
        "states": sorted({row["state"] for row in rows}),
        "replayed": found.state_id,
        "records": found.records,
        "steps": found.steps,
        "killed": {"peer": actors[VICTIM].name, "at_record": killed_at},
        "late": {"peer": actors[LATE].name, "checkpoint": actors[LATE].checkpoint()},
        "adapter": str(first / "adapter"),
        "seconds": seconds,
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    for row in report["peers"]:
        yield (
            f"{row['name']:16} {row['records']} records, state {row['state'][:16]}, held-out loss"
            f" {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
        )
    yield (
        f"{report['records']} records, {report['steps']} steps; all states are equal, and equal to"
        " the replayed ledger"
    )
    killed = report["killed"]
    yield f"{killed['peer']} was killed at record {killed['at_record']} and went on"
    late = report["late"]
    if late["checkpoint"] is not None:
        yield (
            f"{late['peer']} joined with a checkpoint of {late['checkpoint']['records']} records,"
            f" {late['checkpoint']['bytes']} bytes"
        )
    yield f"adapter: {report['adapter']}"
