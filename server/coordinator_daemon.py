"""The operator's side, running: gateway, SuperLink, executor and server app, kept alive until the
run is finished.

Any of them may be killed at any time.  The server app is started in a new Flower run; it goes on
from meadow's journal.
"""

from __future__ import annotations

import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..address import split_address
from ..config import Config
from ..errors import ConfigError, FlowerError, RosterError, StorageError
from ..events import Event, EventTail, Observer
from ..file_lock import is_held
from ..listening import require_free
from ..participant_name import normal_name
from ..processes import FIRST_DELAY, HEALTHY_AFTER, LONGEST_DELAY, Program, Supervisor
from ..store import Disk
from .authority import Authority
from .coordinator_home import CoordinatorHome
from .flower_engine import FlowerEngine
from .roster import Note, Participant, Roster

_EVERYWHERE = ("", "0.0.0.0", "[::]")
_LISTEN = "choose another [coordinator] listen, or stop what listens there"
NOTES_SECONDS = 1.0
"""How often the roster's notes are looked at."""
AGAIN_SECONDS = 5.0
"""Between two attempts to approve whoever was invited, where the first failed."""
START_SECONDS = 60.0
"""How long a server app may take from Flower's run to its first sign of life."""


class CoordinatorDaemon:
    """Everything of a run on the operator's machine."""

    def __init__(self, home: CoordinatorHome, config: Config, observer: Observer) -> None:
        self.home, self.config, self.observer = home, config, observer
        disk = Disk()
        self.authority = Authority.open(home.authority, disk)
        self.engine = FlowerEngine(home.flower, disk)
        self.engine.prepare(self.authority)
        self._tail = EventTail(home.run / "events.jsonl")
        self._inbox = NoteTail(observer)
        self._app = _ServerApp(home, self.engine, observer)
        self._approve_not_before = 0.0

    def run(self, stop: Callable[[], bool], opened: Callable[[], None] = lambda: None) -> bool:
        """Until the run is finished (True) or `stop` says so (False); `opened` is called once
        participants can connect.

        Raises ConfigError where the public port cannot be listened at.
        """
        programs = [self.engine.superlink(), self.engine.superexec(self.home.folder)]
        programs.append(self._gateway())
        with (
            Roster.open(self.home.roster) as roster,
            Supervisor(self.home.logs, programs, self.observer) as supervisor,
        ):
            require_free(self.config.coordinator.listen, _LISTEN)
            told = False
            while not self.home.finished.exists() and not stop():
                supervisor.tick()
                if not told and supervisor.ready("gateway"):
                    told = True
                    opened()
                if supervisor.ready("superlink"):
                    self._approve_invited(roster)
                    self._app.keep(supervisor.ready("superexec"))
                self._tell()
                self._inbox.tell(roster)
                time.sleep(0.1)
        self._tell()
        return self.home.finished.exists()

    def _tell(self) -> None:
        for event in self._tail.read():
            self.observer(event)

    def _gateway(self) -> Program:
        coordinator = self.config.coordinator
        command = [sys.executable, "-m", "meadow.server.gateway"]
        command += ["--folder", str(self.home.folder), "--listen", coordinator.listen]
        command += ["--superlink", f"127.0.0.1:{self.engine.port}"]
        command += ["--superlink-authority", str(self.engine.authority_file)]
        command += ["--ready", str(self.home.gateway)]
        return Program("gateway", lambda: command, ready_file=self.home.gateway)

    def _approve_invited(self, roster: Roster) -> None:
        """Where an invitation is enough, whoever used one takes part."""
        if self.config.coordinator.approve != "invited":
            return
        if time.monotonic() < self._approve_not_before:
            return
        for person in roster.participants():
            if person.status == "pending":
                self._approve(roster, person.name)

    def _approve(self, roster: Roster, name: str) -> None:
        """Flower or the disk may refuse, and the operator may decide otherwise meanwhile: the run
        goes on."""
        try:
            approve(roster, self.engine, name)
        except (FlowerError, RosterError, StorageError) as error:
            self.observer(Event("notice", 0, {"text": f"{name} is not approved: {error}"}))
            self._approve_not_before = time.monotonic() + AGAIN_SECONDS


class _ServerApp:
    """The server app, which Flower's executor starts: one at a time, as long as it is needed."""

    def __init__(self, home: CoordinatorHome, engine: FlowerEngine, observer: Observer) -> None:
        self._home, self._engine, self._observer = home, engine, observer
        self._run: int | None = None  # Flower's run
        self._begun = False
        self._asked = 0.0
        self._delay, self._not_before = FIRST_DELAY, 0.0
        self._alive_since: float | None = None

    def keep(self, executor_ready: bool) -> None:
        """Begin a Flower run where no server app lives and none is about to."""
        now = time.monotonic()
        if self._alive():
            self._lives(now)
            return
        self._alive_since = None
        waiting = self._run is not None and not self._begun and now < self._asked + START_SECONDS
        if waiting or not executor_ready or now < self._not_before:
            return
        try:
            self._begin()
        except (FlowerError, StorageError) as error:
            self._observer(Event("notice", 0, {"text": str(error)}))
        self._not_before = time.monotonic() + self._delay
        self._delay = min(LONGEST_DELAY, 2 * self._delay)

    def _lives(self, now: float) -> None:
        """One that ends soon each time is begun less and less often."""
        self._begun = True
        self._alive_since = now if self._alive_since is None else self._alive_since
        if now - self._alive_since > HEALTHY_AFTER:
            self._delay = FIRST_DELAY

    def _begin(self) -> None:
        if self._run is not None:
            self._observer(Event("notice", 0, {"text": "the server app ended; it goes on anew"}))
            old, self._run = self._run, None
            self._engine.stop_run(old)
        self._run = self._engine.start_run()
        self._asked, self._begun = time.monotonic(), False

    def _alive(self) -> bool:
        """Whether some process works on the run."""
        return is_held(self._home.server_app_lock)


class NoteTail:
    """Tells the operator of what participants do and ask, as soon as it is in the roster."""

    def __init__(self, observer: Observer, clock: Callable[[], float] = time.monotonic) -> None:
        self._observer, self._clock = observer, clock
        self._last: int | None = None
        self._not_before = 0.0

    def tell(self, roster: Roster) -> None:
        """What is new; the first time, who waits for approval."""
        if self._clock() < self._not_before:
            return
        self._not_before = self._clock() + NOTES_SECONDS
        notes = roster.notes(self._last or 0)
        for person in roster.participants() if self._last is None else ():
            if person.status == "pending":
                self._say(_waits(person))
        for note in notes if self._last is not None else ():
            if text := _told(note, roster):
                self._say(text)
        self._last = notes[-1].id if notes else self._last or 0

    def _say(self, text: str) -> None:
        self._observer(Event("notice", 0, {"text": text}))


def _told(note: Note, roster: Roster) -> str:
    """A note as a line for the operator; "" for what the operator did."""
    if note.kind == "refusal":
        return f"{note.name} refuses, {note.text}"
    if note.kind == "withdraw":
        return f"{note.name} withdraws: before the next round its contributions are deleted"
    person = roster.by_name(note.name) if note.kind == "enrolled" else None
    return _waits(person) if person is not None and person.status == "pending" else ""


def _waits(person: Participant) -> str:
    return (
        f"{person.name} waits for approval, fingerprint {person.fingerprint}:"
        f" compare it, then `meadow coordinator approve {shlex.quote(person.name)}`"
    )


def approve(roster: Roster, engine: FlowerEngine, name: str, running: bool = True) -> None:
    """Admit a participant who has enrolled.

    Raises RosterError where there is nothing to approve, ConfigError where no coordinator is
    `running` that Flower could be told by, FlowerError where Flower refuses.
    """
    with engine.registering():
        person, node = roster.by_name(name), 0
        if person is not None and person.status == "approved":
            return
        if person is not None and person.status == "pending":
            if not running:
                raise ConfigError("the coordinator is not running", "start it, then approve")
            node = engine.register(person.flower_key, roster.nodes())
        roster.approve(name, node)  # says what is wrong where there is nothing to approve


def require_fingerprint(roster: Roster, name: str, expected: str) -> None:
    """Raise RosterError unless a participant's key is the one that was read out."""
    person = roster.by_name(name)
    found = "" if person is None else person.fingerprint
    if "".join(found.split()) != "".join(expected.lower().split()):
        raise RosterError(
            f"the key of {name} has the fingerprint {found or 'of nobody'}, not {expected}",
            "approve nobody whose fingerprint differs: ask the participant again",
        )


def check_settings(config: Config) -> None:
    """Raise, before anything is made, FormatError for an address that is none, InvitationError for
    a name that cannot be, ConfigError or IdentityError for an own certificate of no use."""
    for address in public_addresses(config):
        split_address(address)
    for name in config.coordinator.invite:
        normal_name(name)
    if config.coordinator.certificate:
        _check_certificate(Path(config.coordinator.certificate), Path(config.coordinator.key))


def _check_certificate(certificate: Path, key: Path) -> None:
    for path, setting in ((certificate, "certificate"), (key, "key")):
        if not path.is_file():
            raise ConfigError(f"there is no {path}", f"[coordinator] {setting} names it")
    Authority.server_files(certificate, key)


def not_invited(config: Config, roster: Roster) -> list[str]:
    """Who is to be invited when the run begins, and has never been."""
    known = {person.name for person in roster.participants()}
    return [name for name in map(normal_name, config.coordinator.invite) if name not in known]


def public_addresses(config: Config) -> list[str]:
    """Where participants reach the gateway."""
    if config.coordinator.addresses:
        return list(config.coordinator.addresses)
    host, _, port = config.coordinator.listen.rpartition(":")
    return [f"{socket.getfqdn() if host in _EVERYWHERE else host}:{port}"]
