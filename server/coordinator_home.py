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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, load, write
from ..errors import ConfigError, FormatError, JournalError
from ..file_lock import is_held
from ..identity import Identity
from ..journal import Journal, RunIdentity
from ..peft_adapters.blueprint import Blueprint, check_shape
from ..store import Disk, explained
from ..strategies.registry import strategy_of
from ..terms import draft, fields_of
from .publishing import check_serve
from .run_folder import environment

_RESTORE = "restore it from a backup, or install the meadow that wrote it"


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

    def prepare(
        self, config: Config, blueprint: Blueprint, bundle: str, identity: Identity, disk: Disk
    ) -> bool:
        """Begin a run here, or go on with the one that was begun; whether participants have to
        agree anew, because another version of meadow goes on with it.

        `identity` is the operator's.  Raises JournalError where the folder holds another run:
        participants approved that one.
        """
        self.make(disk)
        disk.folder(self.run)
        before = self._terms_before(config, blueprint)
        if not self.identity_file.exists():
            disk.write(self.identity_file, identity.private_pem, 0o600)
        run_id = before["run"] if before else self._new_run(config, blueprint, disk)
        disk.write(self.settings, write(config).encode())
        terms = draft(config, run_id, blueprint.digest, bundle, self.identity())
        disk.write(self.terms, json.dumps(terms, indent=1).encode())
        return bool(before) and before != json.loads(json.dumps(terms))

    def _terms_before(self, config: Config, blueprint: Blueprint) -> dict[str, Any]:
        """The terms of the run that was begun here; {} where none was."""
        if self.settings.exists() and load(self.settings).shared() != config.shared():
            raise JournalError(
                f"{self.folder} holds a run with other settings, which participants approved",
                "choose another --out",
            )
        if not self.terms.exists():
            return {}
        terms = _fields_in(self.terms)
        if terms["base_digest"] != blueprint.digest:
            raise JournalError(
                f"the base model {config.model.base} is another than the run began with",
                "put the right files there, or choose another --out",
            )
        return terms

    def _new_run(self, config: Config, blueprint: Blueprint, disk: Disk) -> str:
        with Journal.open(self.run, run_identity(config, blueprint), disk) as journal:
            return journal.run_id


def run_identity(config: Config, blueprint: Blueprint) -> RunIdentity:
    """What the journal belongs to; addresses may change during a run.

    The threads are those that the server app takes, whichever process asks.
    """
    found = environment()
    found["threads"] = str(config.simulation.threads or found["threads"])
    return RunIdentity(config.shared().digest(), blueprint.digest, found)


def check_deployable(config: Config, blueprint: Blueprint) -> None:
    """Refuse what cannot be trained, before anyone is invited."""
    strategy = strategy_of(config)
    strategy.check_clients(config.clients)
    check_shape(config.model.rank, blueprint.layers, strategy.integers)
    check_serve(config)
    if config.simulation.engine != "sequential":
        raise ConfigError(
            '[simulation] engine = "fused" is for one machine', 'take engine = "sequential"'
        )


def _fields_in(path: Path) -> dict[str, Any]:
    """The terms in a file, whichever version of meadow wrote them.  Raises FormatError."""
    with explained(path):
        data = path.read_bytes()
    try:
        return fields_of(data)
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", _RESTORE) from error
