"""A deployed run begins, or goes on: settings and terms in the coordinator's folder, and whether
they can be trained at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Config, load, write
from ..errors import ConfigError, FormatError, JournalError
from ..identity import Identity
from ..journal import Journal, RunIdentity
from ..peft_adapters.blueprint import Blueprint, check_shape
from ..store import Disk, explained
from ..strategies.registry import strategy_of
from ..terms import draft, fields_of
from .coordinator_home import CoordinatorHome
from .publishing import check_serve
from .run_folder import environment

_RESTORE = "restore it from a backup, or install the meadow that wrote it"


def begin(
    home: CoordinatorHome,
    config: Config,
    blueprint: Blueprint,
    bundle: str,
    identity: Identity,
    disk: Disk,
) -> bool:
    """Begin a run in a folder, or go on with the one that was begun; whether participants have to
    agree anew, because another version of meadow goes on with it.

    `identity` is the operator's.  Raises JournalError where the folder holds another run:
    participants approved that one.
    """
    home.make(disk)
    disk.folder(home.run)
    before = _terms_before(home, config, blueprint)
    if not home.identity_file.exists():
        disk.write(home.identity_file, identity.private_pem, 0o600)
    run_id = before["run"] if before else _new_run(home, config, blueprint, disk)
    disk.write(home.settings, write(config).encode())
    terms = draft(config, run_id, blueprint.digest, bundle, home.identity())
    disk.write(home.terms, json.dumps(terms, indent=1).encode())
    return bool(before) and before != json.loads(json.dumps(terms))


def _terms_before(home: CoordinatorHome, config: Config, blueprint: Blueprint) -> dict[str, Any]:
    """The terms of the run that was begun here; {} where none was."""
    if home.settings.exists() and load(home.settings).shared() != config.shared():
        raise JournalError(
            f"{home.folder} holds a run with other settings, which participants approved",
            "choose another --out",
        )
    if not home.terms.exists():
        return {}
    terms = _fields_in(home.terms)
    if terms["base_digest"] != blueprint.digest:
        raise JournalError(
            f"the base model {config.model.base} is another than the run began with",
            "put the right files there, or choose another --out",
        )
    return terms


def _new_run(home: CoordinatorHome, config: Config, blueprint: Blueprint, disk: Disk) -> str:
    with Journal.open(home.run, run_identity(config, blueprint), disk) as journal:
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
