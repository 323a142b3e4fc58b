"""The participant's daemon: forwarder, resident trainer and Flower's SuperNode, kept alive.

While the participant has paused, the SuperNode is stopped: the coordinator sees a participant that
is away, not one that refuses.  The trainer keeps its base loaded.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import FlowerError
from ..events import Event, Observer
from ..flower_commands import bundle_digest, bundle_in, environment, program
from ..processes import Program, Supervisor, free_port
from ..store import Disk, explained, locked
from ..terms import Terms
from .home import FLOWER_KEY, FORWARDER_AUTHORITY, LOCK, PAUSED, SOCKET, terms_in

FORWARDER, TRAINER, SUPERNODE = "forwarder", "trainer", "supernode"


class ClientDaemon:
    """Everything of one participant in one run."""

    def __init__(self, folder: Path, observer: Observer) -> None:
        """`folder` is the participant's, as `meadow client join` made it.

        Raises ConfigError where nothing was agreed to in it, FlowerError where this machine's
        bundle of entry points is another than the approved one.
        """
        self.folder, self.observer = folder, observer
        self._disk = Disk()
        self._flower = folder / "flower"
        self.bundle = own_bundle(folder, terms_in(folder), self._disk)
        self._forwarder_ready = folder / "forwarder.port"
        self._trainer_ready = folder / "trainer.pid"
        self._given = ""  # the forwarder's port that the SuperNode was started with
        if not (self._flower / "secret").exists():
            self._disk.write(self._flower / "secret", secrets.token_bytes(32), 0o600)

    def run(self, stop: Callable[[], bool]) -> None:
        """Until `stop` says so.  Raises JournalError where another daemon works in the folder."""
        programs = [self._forwarder(), self._trainer(), self._supernode()]
        paused = None
        with (
            locked(self.folder / LOCK, "its daemon runs already: `meadow client status`"),
            Supervisor(self.folder / "logs", programs, self.observer, self._disk) as supervisor,
        ):
            while not stop():
                before, paused = paused, (self.folder / PAUSED).exists()
                if paused != before and (paused or before is not None):
                    self.observer(Event("notice", 0, {"text": "paused" if paused else "resumed"}))
                if self._given and supervisor.ready(FORWARDER) and self._given != self._port():
                    supervisor.stop(SUPERNODE)  # it would ask where nobody is any more
                supervisor.tick([FORWARDER, TRAINER] if paused else None)
                time.sleep(0.1)

    def _forwarder(self) -> Program:
        command = [sys.executable, "-m", "meadow.client.forwarder", "--folder", str(self.folder)]
        command += ["--bundle", str(self.bundle), "--ready", str(self._forwarder_ready)]
        return Program(FORWARDER, lambda: command, ready_file=self._forwarder_ready)

    def _trainer(self) -> Program:
        command = [sys.executable, "-m", "meadow.client.resident_trainer"]
        command += ["--folder", str(self.folder), "--ready", str(self._trainer_ready)]
        return Program(TRAINER, lambda: command, ready_file=self._trainer_ready)

    def _supernode(self) -> Program:
        def command() -> list[str]:
            self._given = self._port()
            return [
                program("flower-supernode"),
                *("--superlink", f"127.0.0.1:{self._given}"),
                *("--root-certificates", str(self.folder / FORWARDER_AUTHORITY)),
                *("--auth-supernode-private-key", str(self.folder / FLOWER_KEY)),
                *("--superexec-auth-secret-file", str(self._flower / "secret")),
                *("--port", str(free_port())),
                *("--node-config", f"trainer={_toml(self.folder / SOCKET)}"),
            ]

        return Program(SUPERNODE, command, environment(self._flower / "home"))

    def _port(self) -> str:
        """Where the forwarder listens; its last port where that is free, or another."""
        with explained(self._forwarder_ready):
            return self._forwarder_ready.read_text()


def own_bundle(folder: Path, terms: Terms, disk: Disk) -> Path:
    """The bundle that this machine's meadow builds for the participant in `folder`.

    Raises FlowerError unless it is the run's.
    """
    flower = folder / "flower"
    disk.folder(flower)
    bundle = bundle_in(flower, disk)
    if bundle_digest(bundle) != terms.bundle:
        raise FlowerError(
            "the coordinator's bundle is another than this machine builds, so it is refused",
            "install the coordinator's version of meadow and of flwr",
        )
    return bundle


def _toml(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
