"""Processes that belong together: started in order, restarted with back-off, stopped as one.

Each child leads a process group of its own, so that what it started goes with it, and writes to
a log file.  On Linux a child also ends when its supervisor is killed; elsewhere, and for
grandchildren, the groups that a killed supervisor left behind are ended by the next one, which
finds them in `processes.json`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .closeable import Closeable
from .errors import StorageError
from .events import Event, Observer
from .store import Disk, explained

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before a restart; doubled each time
HEALTHY_AFTER = 60.0  # seconds of life after which the back-off begins anew
_PATIENCE = 8.0  # seconds between asking a group to end and ending it
_LARGEST_LOG = 10_000_000  # bytes; what is older is kept beside it, once
_TAIL, _LONGEST_SAID = 4096, 300  # bytes of a log that are looked at, characters that are told
_DIE_WITH_PARENT = 1  # prctl(2): PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)  # before the fork, after which little is safe


@dataclass(frozen=True)
class Program:
    """What to start.  It can be used once its `ready_file` is there and its `port` on this
    machine answers; None: at once."""

    name: str
    command: Callable[[], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_file: Path | None = None
    port: int | None = None

    @property
    def answers(self) -> bool:
        if self.ready_file is not None and not self.ready_file.exists():
            return False
        return self.port is None or _answers(self.port)


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay: float = FIRST_DELAY
    not_before: float = 0.0
    ready: bool = False  # since it was started

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor(Closeable):
    """Keeps programs running.  One thread uses it: `tick` often, or `wait`."""

    def __init__(
        self,
        folder: Path,
        programs: Sequence[Program],
        observer: Observer = lambda event: None,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Logs and `processes.json` go into `folder`; what an earlier supervisor left is ended."""
        self._folder, self._disk, self._clock = folder, disk or Disk(), clock
        self._observer = observer
        self._children = {program.name: _Child(program) for program in programs}
        self._disk.folder(folder)
        self._record = folder / "processes.json"
        _end_leftovers(self._record)

    def tick(self, wanted: Sequence[str] | None = None) -> None:
        """Start what is wanted (None: all) and not running, where its back-off is over and those
        before it are ready; stop what is running and not wanted."""
        names = list(self._children) if wanted is None else list(wanted)
        for name in self._children.keys() - names:
            self.stop(name)
        for name in names:
            child = self._children[name]
            if not child.alive:
                self._restart(child)
            _trim(self._log_of(name))
            if not self.ready(name):
                return

    def ready(self, name: str) -> bool:
        """Whether a program runs and has said that it can be used."""
        child = self._children[name]
        if child.alive and not child.ready:
            child.ready = child.program.answers
        return child.alive and child.ready

    def pid(self, name: str) -> int | None:
        child = self._children[name]
        return child.process.pid if child.process is not None and child.alive else None

    def wait(self, until: Callable[[], bool], wanted: Sequence[str] | None = None) -> None:
        """Tick until a condition holds."""
        while not until():
            self.tick(wanted)
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        """End a program and its group; no effect where it does not run."""
        child = self._children[name]
        if child.process is not None:
            _end_group(child.process)
            child.process, child.delay, child.not_before = None, FIRST_DELAY, 0.0
            self._write()

    def close(self) -> None:
        """End all, the last started first."""
        for name in reversed(self._children):
            self.stop(name)
        self._record.unlink(missing_ok=True)

    def _restart(self, child: _Child) -> None:
        now = self._clock()
        if child.process is not None:
            self._mourn(child, now)
        if now < child.not_before:
            return
        try:
            self._start(child, now)
        except StorageError as error:
            self._put_off(child, now, f"{child.program.name} is not started: {error}")

    def _mourn(self, child: _Child, now: float) -> None:
        """A child has ended by itself: say so, end its group and set its back-off."""
        assert child.process is not None
        lived = now - child.started
        child.delay = FIRST_DELAY if lived > HEALTHY_AFTER else child.delay
        code = child.process.returncode
        text = f"{child.program.name} ended ({_status(code)})"
        if code > 0 and (said := _last_line(self._log_of(child.program.name))):
            text += f" and said: {said}"
        self._put_off(child, now, text)
        _end_group(child.process)
        child.process = None

    def _put_off(self, child: _Child, now: float, text: str) -> None:
        """Say why a child is to be started again, and when."""
        self._observer(Event("notice", 0, {"text": f"{text}; again in {child.delay:g} s"}))
        child.not_before = now + child.delay
        child.delay = min(LONGEST_DELAY, 2 * child.delay)

    def _start(self, child: _Child, now: float) -> None:
        program = child.program
        child.ready = False
        if program.ready_file is not None:
            program.ready_file.unlink(missing_ok=True)
        command = list(program.command())
        log = self._log_of(program.name)
        with explained(log), log.open("ab", buffering=0) as output:
            child.process = subprocess.Popen(
                command,
                env={**os.environ, **program.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        child.started = now
        self._write()

    def _log_of(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _write(self) -> None:
        """Keep which groups run, for who comes after a supervisor that was killed.  A disk that
        refuses is no reason to stop them."""
        groups = {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process is not None
        }
        try:
            self._disk.write(self._record, json.dumps(groups).encode())
        except StorageError as error:
            self._observer(Event("notice", 0, {"text": str(error)}))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no such file system, or it ended meanwhile
        return False
    return state == "Z"


def _trim(log: Path) -> None:
    """Put what a log holds beside it, where it has grown large.  Who writes it goes on in the same
    file, and appends: the next line is its first."""
    with suppress(OSError):  # no room for a copy, or no log yet
        if log.stat().st_size > _LARGEST_LOG:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)


def _last_line(log: Path) -> str:
    """The last thing that a program has written, as one printable line."""
    with explained(log), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").strip().splitlines() or [""]
    return "".join(c if c.isprintable() else " " for c in lines[-1])[-_LONGEST_SAID:]


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit {code}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask a whole group to end, and end it where it does not."""
    _signal(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and (process.poll() is None or _exists(process.pid)):
        time.sleep(0.05)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # nothing there, or only what is not ours
        return


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end_leftovers(record: Path) -> None:
    """End the groups that a supervisor which was killed has left."""
    if not record.exists():
        return
    try:
        groups = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        groups = {}  # a record is written whole: this one is not ours
    for group in groups.values():
        if isinstance(group, int) and group > 1 and _is_ours(group):
            _signal(group, signal.SIGKILL)
    record.unlink()


def _is_ours(group: int) -> bool:
    """Whether some process of a group is one that a supervisor starts: numbers are used again."""
    found = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pgid=,args="], capture_output=True, text=True, check=False
    )
    for line in found.stdout.splitlines():
        number, _, command = line.strip().partition(" ")
        if number == str(group) and any(word in command for word in ("meadow", "flower-", "flwr")):
            return True
    return False


def _die_with_parent() -> None:
    _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGTERM)
