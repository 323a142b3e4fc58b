"""A coordinator's folder: where everything of one deployed run lies.

run.toml        the settings, as they were when the run began
terms.json      what participants are told of them, and approve
authority/      the certificate authority and its key
roster.db       participants, invitations, audit trail
identity.pem    the operator's key when the run began: participants approved it, and the result is
                signed with it
run/            the run's folder: journal, metrics, events, adapter, manifest
flower/         what Flower's programs keep
logs/           of every process
paused          exists while no new round may begin
coordinator.lock    held while a coordinator works here
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Config, load
from ..errors import ConfigError
from ..file_lock import is_held
from ..identity import Identity
from ..store import Disk, explained


@dataclass(frozen=True)
class CoordinatorHome:
    """Paths in a coordinator's folder, and the few files that others read."""

    folder: Path

    @property
    def settings(self) -> Path:
        return self.folder / "run.toml"

    @property
    def terms(self) -> Path:
        return self.folder / "terms.json"

    @property
    def authority(self) -> Path:
        return self.folder / "authority"

    @property
    def roster(self) -> Path:
        return self.folder / "roster.db"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def flower(self) -> Path:
        return self.folder / "flower"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def paused(self) -> Path:
        return self.folder / "paused"

    @property
    def lock(self) -> Path:
        return self.folder / "coordinator.lock"

    @property
    def identity_file(self) -> Path:
        return self.folder / "identity.pem"

    def identity(self) -> Identity:
        """The coordinator's key.  Raises ConfigError where it is missing."""
        if not self.identity_file.exists():
            raise ConfigError(f"there is no {self.identity_file}", "restore it from a backup")
        return Identity.load_or_create(self.identity_file)

    @property
    def running(self) -> bool:
        """Whether a coordinator works in this folder now."""
        return is_held(self.lock)

    @property
    def finished(self) -> Path:
        """Written last, once the adapter is there."""
        return self.run / "finished.json"

    @property
    def gateway(self) -> Path:
        """The gateway's port, as text; written anew whenever a gateway begins to listen."""
        return self.folder / "gateway.port"

    def which_gateway(self) -> tuple[int, int] | None:
        """Differs between one gateway and the next; None while none listens."""
        try:
            found = self.gateway.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @property
    def server_app(self) -> Path:
        """The process id of the server app that works on the run, for people."""
        return self.run / "server-app.pid"

    @property
    def server_app_lock(self) -> Path:
        """Held by the server app that works on the run; unlike its number, never another's."""
        return self.run / "server-app.lock"

    def make(self, disk: Disk) -> None:
        """The folder, which nobody else can enter: it holds keys and participants' updates."""
        disk.folder(self.folder)
        with explained(self.folder):
            self.folder.chmod(0o700)

    def config(self) -> Config:
        """The run's settings.  Raises ConfigError where no run was begun here."""
        if not self.settings.exists():
            raise ConfigError(
                f"{self.folder} is no coordinator's folder", "begin with meadow coordinator start"
            )
        return load(self.settings)
