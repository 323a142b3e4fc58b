"""A coordinator's folder: where everything of one deployed run lies.

run.toml        the settings, as they were when the run began
terms.json      what participants are told of them, and approve
authority/      the certificate authority and its key
roster.db       participants, invitations, audit trail
run/            the run's folder: journal, metrics, events, adapter, manifest
flower/         what Flower's programs keep
logs/           of every process
paused          exists while no new round may begin
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import Config, load, to_json, write
from ..errors import ConfigError, FormatError, JournalError
from ..identity import Identity
from ..journal import Journal, RunIdentity
from ..peft_adapters.blueprint import Blueprint, check_shape
from ..store import Disk, explained
from ..strategies.registry import make
from ..wire import canonical
from .run_folder import environment

FORMAT = 1


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
    def finished(self) -> Path:
        """Written last, once the adapter is there."""
        return self.run / "finished.json"

    @property
    def server_app(self) -> Path:
        """The process id of the server app that works on the run."""
        return self.run / "server-app.pid"

    def config(self) -> Config:
        """The run's settings.  Raises ConfigError where no run was begun here."""
        if not self.settings.exists():
            raise ConfigError(
                f"{self.folder} is no coordinator's folder", "begin with meadow coordinator start"
            )
        return load(self.settings)

    def prepare(
        self, config: Config, blueprint: Blueprint, bundle: str, identity: Identity, disk: Disk
    ) -> None:
        """Begin a run here, or check that it is the one that was begun.

        Raises JournalError where the folder holds another run: participants approved that one.
        """
        disk.folder(self.folder)
        disk.folder(self.run)
        if self.settings.exists() and load(self.settings).shared() != config.shared():
            raise JournalError(
                f"{self.folder} holds a run with other settings, which participants approved",
                "choose another --out",
            )
        with Journal.open(self.run, run_identity(config, blueprint), disk) as journal:
            run_id = journal.run_id
        disk.write(self.settings, write(config).encode())
        terms = terms_of(config, run_id, blueprint.digest, bundle, identity)
        disk.write(self.terms, json.dumps(terms, indent=1).encode())

    def read_terms(self) -> dict[str, Any]:
        with explained(self.terms):
            return read_terms(self.terms.read_bytes())


def run_identity(config: Config, blueprint: Blueprint) -> RunIdentity:
    """What the journal belongs to; addresses may change during a run."""
    return RunIdentity(config.shared().digest(), blueprint.digest, environment())


def check_deployable(config: Config, blueprint: Blueprint) -> None:
    """Refuse what cannot be trained, before anyone is invited."""
    strategy = make(config.strategy.name, config.strategy.options, (), config.model.rank)
    strategy.check_clients(config.clients)
    check_shape(config.model.rank, blueprint.layers, strategy.integers)
    if config.simulation.engine != "sequential":
        raise ConfigError(
            '[simulation] engine = "fused" is for one machine', 'take engine = "sequential"'
        )


def terms_of(
    config: Config, run_id: str, base_digest: str, bundle: str, identity: Identity
) -> dict[str, Any]:
    """What a participant reads, approves and pins: JSON."""
    shared = config.shared()
    return {
        "format": FORMAT,
        "run": run_id,
        "config": to_json(shared),
        "config_digest": shared.digest(),
        "base_digest": base_digest,
        "bundle": bundle,
        "coordinator": identity.public.public_bytes_raw().hex(),
        "meadow": __version__,
    }


def read_terms(data: bytes) -> dict[str, Any]:
    """Terms from bytes.  Raises FormatError."""
    try:
        terms = json.loads(data)
        version = terms["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError("these are not the terms of a run") from error
    if version != FORMAT:
        raise FormatError(f"the terms have format {version}; this meadow reads format {FORMAT}")
    return dict(terms)


def terms_digest(terms: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(terms).encode()).hexdigest()
