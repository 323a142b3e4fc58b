"""The participant's daemon over programs that sleep: what runs when, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from homes import RUN, make_home, terms_json

from meadow.client import daemon as module
from meadow.client.daemon import FORWARDER, SUPERNODE, TRAINER, ClientDaemon, own_bundle
from meadow.client.daemon_status import status_of
from meadow.client.home import (
    FLOWER_KEY,
    FORWARDER_AUTHORITY,
    OUTGOING,
    PAUSED,
    POLICY,
    SOCKET,
    TERMS,
    terms_in,
)
from meadow.client.membership import Membership
from meadow.client.outgoing_log import Kind, OutgoingLog
from meadow.client.policy import Policy
from meadow.client.resident_trainer import ResidentTrainer
from meadow.client.trainer_socket import TrainerSocket
from meadow.config import Config
from meadow.errors import ConfigError, FlowerError, JournalError
from meadow.events import Event
from meadow.flower_commands import bundle_digest
from meadow.processes import Program
from meadow.store import Disk
from meadow.terms import Terms

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
REAL_SUPERNODE = ClientDaemon._supernode


@pytest.fixture
def folder(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A participant's folder that agreed to this machine's bundle."""
    bundle = tmp_path / "bundle.fab"
    bundle.write_bytes(b"entry points")
    monkeypatch.setattr(module, "bundle_in", lambda folder, disk: bundle)
    folder = make_home(tmp_path / "ada", tiny)
    (folder / TERMS).write_bytes(terms_json(tiny, bundle=bundle_digest(bundle)))
    Membership("ada", ("127.0.0.1:1",), "", "00" * 16).save(folder, Disk())
    return folder


@contextmanager
def running(daemon: ClientDaemon) -> Iterator[None]:
    """The daemon at work, in a thread; its programs sleep."""
    stop = threading.Event()
    thread = threading.Thread(target=daemon.run, args=(stop.is_set,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(folder: Path) -> set[str]:
    record = folder / "logs" / "processes.json"
    return set(json.loads(record.read_text())) if record.exists() else set()


@pytest.fixture
def asleep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """All three programs sleep; what the daemon says."""
    for name in (FORWARDER, TRAINER, SUPERNODE):
        program = Program(name, lambda: SLEEP)
        monkeypatch.setattr(ClientDaemon, f"_{name}", lambda self, program=program: program)
    return []


def test_pausing_stops_the_supernode_alone(folder: Path, asleep: list[Event]) -> None:
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: alive(folder) == {FORWARDER, TRAINER, SUPERNODE})
        (folder / PAUSED).touch()
        eventually(lambda: alive(folder) == {FORWARDER, TRAINER})
        (folder / PAUSED).unlink()
        eventually(lambda: alive(folder) == {FORWARDER, TRAINER, SUPERNODE})
    assert [event.data["text"] for event in asleep] == ["paused", "resumed"]
    assert alive(folder) == set()


def test_who_was_paused_before_the_start_stays_so(folder: Path, asleep: list[Event]) -> None:
    (folder / PAUSED).touch()
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: alive(folder) == {FORWARDER, TRAINER})
        assert status_of(folder)["daemon"] and status_of(folder)["paused"]
    assert [event.data["text"] for event in asleep] == ["paused"]


def test_a_second_daemon_is_refused_by_name(folder: Path, asleep: list[Event]) -> None:
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: SUPERNODE in alive(folder))
        with pytest.raises(JournalError, match=r"working in .*ada \(its daemon runs already"):
            ClientDaemon(folder, asleep.append).run(lambda: True)
        assert alive(folder) == {FORWARDER, TRAINER, SUPERNODE}  # and the first one goes on


def test_what_a_program_that_fails_has_said_is_told(
    folder: Path, asleep: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Program(FORWARDER, lambda: [sys.executable, "-c", "import sys; sys.exit('no such key')"])
    monkeypatch.setattr(ClientDaemon, "_forwarder", lambda self: bad)
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: bool(asleep))
    assert "forwarder ended (exit 1) and said: no such key; again in" in asleep[0].data["text"]


def test_the_programs_get_what_they_need_and_paths_with_spaces_survive(
    folder: Path, tmp_path: Path
) -> None:
    odd = folder.rename(tmp_path / 'a "b" c')
    daemon = ClientDaemon(odd, lambda event: None)
    (odd / "forwarder.port").write_text("4711")
    supernode = list(daemon._supernode().command())
    said = dict(zip(supernode[1::2], supernode[2::2], strict=True))
    assert said["--superlink"] == "127.0.0.1:4711"
    assert said["--root-certificates"] == str(odd / FORWARDER_AUTHORITY)
    assert said["--auth-supernode-private-key"] == str(odd / FLOWER_KEY)
    assert said["--node-config"] == f"trainer={json.dumps(str(odd / SOCKET))}"
    secret = Path(said["--superexec-auth-secret-file"])
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 32
    assert "--insecure" not in shlex.join(supernode)
    environment = daemon._supernode().environment
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"].startswith(str(odd))


def test_a_bundle_that_this_machine_does_not_build_is_refused(
    folder: Path, tiny: Config, tmp_path: Path
) -> None:
    terms = Terms.parse(terms_json(tiny, bundle="ab" * 32))
    with pytest.raises(FlowerError, match="another than this machine builds, so it is refused"):
        own_bundle(folder, terms, Disk())
    (folder / TERMS).write_bytes(terms_json(tiny, bundle="ab" * 32))
    with pytest.raises(FlowerError, match="so it is refused"):
        ClientDaemon(folder, lambda event: None)


def test_who_has_agreed_to_nothing_has_no_daemon(folder: Path) -> None:
    (folder / TERMS).unlink()
    with pytest.raises(ConfigError, match=r"there is no .*terms.json \(`meadow client join`"):
        ClientDaemon(folder, lambda event: None)


# --- status --------------------------------------------------------------------------------------


def test_without_a_daemon_the_status_is_what_the_folder_says(folder: Path) -> None:
    found = status_of(folder)
    assert (found["name"], found["daemon"], found["trainer"]) == ("ada", False, False)
    assert found["sent"] == {"messages": 0, "bytes": 0, "last": 0.0}
    assert found["certificate_expires"] == 0.0 and "working" not in found


def test_a_daemon_whose_trainer_does_not_answer_yet(folder: Path, asleep: list[Event]) -> None:
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: SUPERNODE in alive(folder))
        found = status_of(folder)
    assert found["daemon"] and not found["trainer"]


def test_the_trainers_own_word_is_in_the_status(folder: Path, asleep: list[Event]) -> None:
    terms = terms_in(folder)
    Policy.load(folder / POLICY).approving(terms).save(folder / POLICY, Disk())
    with (
        running(ClientDaemon(folder, asleep.append)),
        ResidentTrainer(folder) as trainer,
        TrainerSocket(folder / SOCKET, trainer.handle),
    ):
        eventually(lambda: SUPERNODE in alive(folder))
        found = status_of(folder)
    assert found["trainer"] and found["run"] == terms.run and found["working"] is None


@pytest.mark.parametrize(("kind", "round", "finished"), [
    ("evaluate", 2, True), ("train", 2, False), ("evaluate", 1, False),
])  # fmt: skip
def test_a_run_is_finished_once_its_last_result_was_measured(
    folder: Path, tiny: Config, kind: Kind, round: int, finished: bool
) -> None:
    """Whether or not the daemon, or even the coordinator, still runs."""
    (folder / TERMS).write_bytes(terms_json(tiny.replace(rounds={"count": 2})))
    assert not status_of(folder)["finished"]
    log = OutgoingLog(folder / OUTGOING)
    log.append(kind, b"an answer", run=RUN, round=round, received=0, about={})
    assert status_of(folder)["finished"] is finished


LISTENS = """
import pathlib, sys, time
count = pathlib.Path(sys.argv[1])
times = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(times))
pathlib.Path(sys.argv[2]).write_text(str(4000 + times))
time.sleep(600)
"""


def test_a_supernode_follows_a_forwarder_that_had_to_take_another_port(
    folder: Path, asleep: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last one was taken while it was dead.  The SuperNode would ask there for ever."""
    ready = folder / "forwarder.port"
    listens = [sys.executable, "-c", LISTENS, str(tmp_path / "count"), str(ready)]
    forwarder = Program(FORWARDER, lambda: listens, ready_file=ready)
    monkeypatch.setattr(ClientDaemon, "_forwarder", lambda self: forwarder)
    commands: list[list[str]] = []
    monkeypatch.setattr(module, "program", lambda name: sys.executable)

    def sleeping(self: ClientDaemon) -> Program:
        real = REAL_SUPERNODE(self)

        def command() -> list[str]:
            commands.append(list(real.command()))
            return SLEEP

        return Program(SUPERNODE, command)

    monkeypatch.setattr(ClientDaemon, f"_{SUPERNODE}", sleeping)
    with running(ClientDaemon(folder, asleep.append)):
        eventually(lambda: SUPERNODE in alive(folder))
        record = json.loads((folder / "logs" / "processes.json").read_text())
        os.kill(record[FORWARDER], signal.SIGKILL)
        eventually(lambda: len(commands) == 2)
        eventually(lambda: SUPERNODE in alive(folder))
    assert ["127.0.0.1:4001" in commands[0], "127.0.0.1:4002" in commands[1]] == [True, True]
    ports = {command[command.index("--port") + 1] for command in commands}
    assert len(ports) == 2, "each start takes a port that is free then"
