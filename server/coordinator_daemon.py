"""The operator's side, running: gateway, SuperLink, executor and server app, kept alive until the
run is finished.

Any of them may be killed at any time.  The server app is started in a new Flower run; it goes on
from meadow's journal.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

from ..config import Config
from ..errors import FlowerError
from ..events import Event, EventTail, Observer
from ..processes import FIRST_DELAY, LONGEST_DELAY, Program, Supervisor, is_alive
from ..store import Disk
from .authority import Authority
from .coordinator_home import CoordinatorHome
from .flower_engine import FlowerEngine
from .roster import Roster

_EVERYWHERE = ("", "0.0.0.0", "[::]")
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
        self._gateway_ready = home.folder / "gateway.port"
        self._tail = EventTail(home.run / "events.jsonl")
        self._app = _ServerApp(home, self.engine, observer)

    def run(self, stop: Callable[[], bool]) -> bool:
        """Until the run is finished (True) or `stop` says so (False)."""
        programs = [self.engine.superlink(), self.engine.superexec(self.home.folder)]
        programs.append(self._gateway())
        with (
            Roster.open(self.home.roster) as roster,
            Supervisor(self.home.logs, programs, self.observer) as supervisor,
        ):
            while not self.home.finished.exists() and not stop():
                supervisor.tick()
                if supervisor.ready("superlink"):
                    self._approve_invited(roster)
                    self._app.keep(supervisor.ready("superexec"))
                self._tell()
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
        command += ["--ready", str(self._gateway_ready)]
        return Program("gateway", lambda: command, ready_file=self._gateway_ready)

    def _approve_invited(self, roster: Roster) -> None:
        """Where an invitation is enough, whoever used one takes part."""
        if self.config.coordinator.approve == "invited":
            for person in roster.participants():
                if person.status == "pending":
                    try:
                        approve(roster, self.engine, person.name)
                    except FlowerError as error:
                        self.observer(Event("notice", 0, {"text": str(error)}))


class _ServerApp:
    """The server app, which Flower's executor starts: one at a time, as long as it is needed."""

    def __init__(self, home: CoordinatorHome, engine: FlowerEngine, observer: Observer) -> None:
        self._home, self._engine, self._observer = home, engine, observer
        self._run: int | None = None  # Flower's run
        self._begun = False
        self._asked = 0.0
        self._delay, self._not_before = FIRST_DELAY, 0.0

    def keep(self, executor_ready: bool) -> None:
        """Begin a Flower run where no server app lives and none is about to."""
        now = time.monotonic()
        if self._alive():
            self._begun, self._delay = True, FIRST_DELAY
            return
        waiting = self._run is not None and not self._begun and now < self._asked + START_SECONDS
        if waiting or not executor_ready or now < self._not_before:
            return
        try:
            self._begin()
        except FlowerError as error:
            self._observer(Event("notice", 0, {"text": str(error)}))
        self._not_before = time.monotonic() + self._delay
        self._delay = min(LONGEST_DELAY, 2 * self._delay)

    def _begin(self) -> None:
        if self._run is not None:
            self._observer(Event("notice", 0, {"text": "the server app ended; it goes on anew"}))
            old, self._run = self._run, None
            self._engine.stop_run(old)
        self._run = self._engine.start_run()
        self._asked, self._begun = time.monotonic(), False

    def _alive(self) -> bool:
        """Whether the process that claims the run exists."""
        try:
            return is_alive(int(self._home.server_app.read_text()))
        except (OSError, ValueError):  # nobody does, or it just ended
            return False


def approve(roster: Roster, engine: FlowerEngine, name: str) -> None:
    """Admit a participant who has enrolled.  Raises FlowerError, InvitationError."""
    people = roster.participants()
    person = next((person for person in people if person.name == name), None)
    key = "" if person is None else person.flower_key
    node = engine.register(key, {person.node_id for person in people}) if key else 0
    roster.approve(name, node)  # says what is wrong where there is nothing to approve


def public_addresses(config: Config) -> list[str]:
    """Where participants reach the gateway."""
    if config.coordinator.addresses:
        return list(config.coordinator.addresses)
    host, _, port = config.coordinator.listen.rpartition(":")
    return [f"{socket.getfqdn() if host in _EVERYWHERE else host}:{port}"]
