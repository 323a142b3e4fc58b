"""Supervised processes: real ones, killed and restarted, and none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meadow import processes
from meadow.errors import StorageError
from meadow.events import Event
from meadow.processes import Program, Supervisor, free_port, is_alive
from meadow.store import Disk

FOREVER = "import time\nwhile True: time.sleep(1)"
LISTEN = """
import socket, sys, time
s = socket.socket(); s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(); time.sleep(600)
"""
WITH_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # flwr-app"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def python(name: str, code: str, *arguments: str, ready: Path | None = None) -> Program:
    return Program(name, lambda: [sys.executable, "-c", code, *arguments], ready_file=ready)


def until(condition: Callable[[], bool], supervisor: Supervisor | None = None) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        if supervisor is not None:
            supervisor.tick()
        time.sleep(0.02)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def supervise(tmp_path: Path, events: list[Event]) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def make(*programs: Program) -> Supervisor:
        made.append(Supervisor(tmp_path / "logs", programs, events.append))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.close()


def pid(supervisor: Supervisor, name: str) -> int:
    found = supervisor.pid(name)
    assert found is not None
    return found


def test_programs_start_in_order_each_once_the_one_before_can_be_used(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    ready.write_text("of an earlier start")
    supervisor = supervise(python("first", FOREVER, ready=ready), python("second", FOREVER))
    supervisor.tick()
    supervisor.tick()
    assert supervisor.pid("first") and not supervisor.pid("second")
    assert not supervisor.ready("first")
    ready.write_text("now")
    supervisor.tick()
    assert supervisor.ready("first") and supervisor.ready("second")


def test_a_port_that_answers_makes_ready(supervise: Callable[..., Supervisor]) -> None:
    port = free_port()
    command = [sys.executable, "-c", LISTEN, str(port)]
    supervisor = supervise(Program("server", lambda: command, port=port))
    supervisor.tick()
    until(lambda: supervisor.ready("server"), supervisor)


def test_what_is_killed_comes_back_with_back_off_and_a_notice(
    supervise: Callable[..., Supervisor], events: list[Event]
) -> None:
    supervisor = supervise(python("one", FOREVER))
    seen, delays = set(), []
    for _ in range(3):
        until(lambda: supervisor.pid("one") is not None, supervisor)
        seen.add(pid(supervisor, "one"))
        os.kill(pid(supervisor, "one"), signal.SIGKILL)
        until(lambda: supervisor.pid("one") is None)
        supervisor.tick()
        delays.append(events[-1].data["text"])
    assert len(seen) == 3
    assert delays == [f"one ended (SIGKILL); again in {s} s" for s in ("0.5", "1", "2")]


def test_a_program_that_fails_says_how(
    supervise: Callable[..., Supervisor], events: list[Event], tmp_path: Path
) -> None:
    supervisor = supervise(python("bad", "import sys; sys.exit('no such thing')"))
    until(lambda: bool(events), supervisor)
    assert "bad ended (exit 1)" in events[0].data["text"]
    assert "no such thing" in (tmp_path / "logs" / "bad.log").read_text()


def test_stopping_ends_the_whole_group(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    told = tmp_path / "child"
    supervisor = supervise(python("parent", WITH_CHILD, str(told)))
    supervisor.tick()
    until(lambda: told.exists() and bool(told.read_text()))
    grandchild, parent = int(told.read_text()), pid(supervisor, "parent")
    supervisor.close()
    until(lambda: not is_alive(grandchild) and not is_alive(parent))


def test_what_is_no_longer_wanted_is_stopped_and_can_come_back(
    supervise: Callable[..., Supervisor],
) -> None:
    supervisor = supervise(python("a", FOREVER), python("b", FOREVER))
    supervisor.tick()
    kept, first = pid(supervisor, "a"), pid(supervisor, "b")
    supervisor.tick(["a"])
    assert supervisor.pid("b") is None and supervisor.pid("a") == kept
    supervisor.tick()
    assert pid(supervisor, "b") != first


KILLED = """
import sys, time
from pathlib import Path
from meadow.processes import Program, Supervisor
code = sys.argv[2]
program = Program("parent", lambda: [sys.executable, "-c", code, sys.argv[3]])
supervisor = Supervisor(Path(sys.argv[1]), [program])
supervisor.tick()
time.sleep(600)
"""


def test_the_next_supervisor_ends_what_a_killed_one_left(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    told = tmp_path / "child"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "logs"), WITH_CHILD, str(told)]
    with subprocess.Popen(command) as first:
        until(lambda: told.exists() and bool(told.read_text()))
        parent = json.loads((tmp_path / "logs" / "processes.json").read_text())["parent"]
        first.kill()
    grandchild = int(told.read_text())
    assert is_alive(grandchild)
    if sys.platform == "linux":
        until(lambda: not is_alive(parent))  # it ends with its supervisor
    supervise()
    until(lambda: not is_alive(parent) and not is_alive(grandchild))
    assert not (tmp_path / "logs" / "processes.json").exists()


def test_a_record_that_is_damaged_stops_nobody(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "processes.json").write_text("{")
    supervise(python("a", FOREVER)).tick()


def test_a_number_that_is_used_again_is_not_ended(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", FOREVER], start_new_session=True) as stranger:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "processes.json").write_text(json.dumps({"old": stranger.pid}))
        supervise(python("a", FOREVER))
        assert is_alive(stranger.pid)
        stranger.kill()


WRITES = """
import sys, time
while True:
    print("a line of the log", flush=True)
    time.sleep(0.001)
"""


def test_a_log_does_not_grow_for_ever(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the program that writes it runs, and goes on writing."""
    monkeypatch.setattr(processes, "_LARGEST_LOG", 2000)
    supervisor = supervise(python("writer", WRITES))
    log, old = tmp_path / "logs" / "writer.log", tmp_path / "logs" / "writer.log.old"
    until(old.exists, supervisor)
    assert b"a line of the log\n" * 50 in old.read_bytes()
    before = pid(supervisor, "writer")
    until(lambda: b"a line" in log.read_bytes())
    assert log.read_bytes().startswith(b"a line") and log.stat().st_size < 10**6
    assert pid(supervisor, "writer") == before


def test_a_full_disk_stops_no_program(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that run nor, once there is room, those that were to be started."""
    full = {"processes.json", "late.log"}

    class Full(Disk):
        def write(self, path: Path, data: bytes, mode: int = 0o666) -> None:
            if path.name in full:
                raise StorageError(f"cannot write {path}: the disk is full")
            super().write(path, data, mode)

    def command() -> list[str]:
        if "late.log" in full:
            raise StorageError("cannot write late.log: the disk is full")
        return [sys.executable, "-c", FOREVER]

    programs = [python("first", FOREVER), Program("late", command)]
    with Supervisor(tmp_path / "logs", programs, events.append, Full()) as supervisor:
        until(lambda: len(events) > 1, supervisor)
        first = pid(supervisor, "first")
        assert "late is not started: cannot write late.log" in events[-1].data["text"]
        full.clear()
        until(lambda: supervisor.pid("late") is not None, supervisor)
        assert pid(supervisor, "first") == first
        assert set(json.loads((tmp_path / "logs" / "processes.json").read_text())) == {
            "first", "late",
        }  # fmt: skip
