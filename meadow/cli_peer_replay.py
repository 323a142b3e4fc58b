"""`meadow peer replay`: the adapter that a ledger's records add up to, and publishing it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import Config
from .display import Display
from .errors import ConfigError, JournalError

FOLDER = "name the folder of a peer that has run"

Add = Callable[..., argparse.ArgumentParser]


def add_replay(commands: Any, add: Add) -> None:
    replay = add(commands, "replay", _replay, "rebuild the adapter from a ledger")
    replay.add_argument("ledger", type=Path, help="a peer's folder")
    replay.add_argument("--base", required=True, help="the base model's folder or name")
    replay.add_argument("--without", action="append", default=[], metavar="PEER")
    replay.add_argument("--state", default="", help="the state, or its first digits, to end in")
    replay.add_argument("--out", type=Path, help="write the adapter there")
    replay.add_argument(
        "--publish", default="", metavar="NAME",
        help="sign the adapter, publish it in this user's registry, and point NAME@prod to it",
    )  # fmt: skip


def read_file(path: Path, hint: str) -> bytes:
    """A file's bytes.  Raises ConfigError with the hint."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint) from error


def ledger_of(folder: Path) -> Any:
    """The ledger of a peer's folder, every signature in it checked."""
    from .client.peer import CHARTER
    from .client.peer_memory import read_ledger
    from .strategies.charter import Charter

    return read_ledger(Charter.read(read_file(folder / CHARTER, FOLDER)), folder)


def _replay(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer_audit import replay
    from .client.peer_terms import refuse_other_base, unscaled
    from .client.workbench import open_workbench
    from .store import Disk

    version = ""
    with Display(console) as display:
        display.enter("checking signatures")
        ledger = ledger_of(options.ledger)
        without = {_peer_named(name, ledger) for name in options.without}
        display.enter("loading the base")
        pool = ledger.charter.pool
        model = {"base": options.base, "targets": _targets(pool.sites)}
        shortest = {"max_length": 8}  # no text is read, and no context is too short for it
        config = unscaled(Config().replace(model=model, data=shortest), ledger.charter)
        bench = open_workbench(config)
        refuse_other_base(ledger.charter, bench)
        display.enter("adding up")
        found = replay(ledger, without)
        _refuse_other_state(found.state_id, options.state)
        if options.out is not None:
            tree = pool.adapter(found.q, config.scaling)
            bench.blueprint.export(config, tree, options.out, pool.run_id, Disk())
        if options.publish:
            display.enter("publishing")
            version = _published(options.publish, found, ledger, bench.blueprint, config)
    screen = Console()
    screen.print(
        f"{found.records} records, {found.steps} steps of {found.peers} peers; all signatures hold"
    )
    screen.print(f"state {found.state_id}", soft_wrap=True)
    if options.publish:
        screen.print(f"published as {version}", soft_wrap=True, highlight=False)
    if without:
        screen.print(
            f"without {', '.join(peer.hex()[:16] for peer in sorted(without))}: its bytes are"
            " retracted. This is not exact unlearning: the others measured on a model that had"
            " them.",
            soft_wrap=True,
        )
    return {
        "state": found.state_id,
        "records": found.records,
        "steps": found.steps,
        "peers": found.peers,
        "without": sorted(peer.hex() for peer in without),
        "excluded": {peer.hex(): end for peer, end in ledger.excluded.items()},
        "adapter": None if options.out is None else str(options.out),
        "published": version,
    }


def _published(name: str, found: Any, ledger: Any, blueprint: Any, config: Config) -> str:
    """Sign the adapter as this user and publish it: `name@prod` is what the records add up to.

    No losses are stated: whoever replays has no text.
    """
    from .identity import own_identity
    from .peft_adapters.manifest import ADAPTER, Provenance, write_manifest
    from .server.registry import Registry, default_folder
    from .server.registry_names import PROD
    from .server.registry_runs import publish_run
    from .store import Disk

    charter, identity, disk = ledger.charter, own_identity(), Disk()
    stated = Provenance(
        run_id=charter.pool.run_id,
        base_digest=blueprint.digest,
        config_digest=charter.digest.hex(),
        strategy="peers",
        rounds=found.records,
        participants=found.peers,
        seed=0,
        name=name,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        tree = charter.pool.adapter(found.q, config.scaling)
        blueprint.export(config, tree, run / ADAPTER, charter.pool.run_id, disk)
        write_manifest(run, identity, stated, disk)
        with Registry.open(default_folder(), identity) as registry:
            return str(publish_run(registry, run, name, alias=PROD, blueprint=blueprint))


def _targets(sites: Iterable[Any]) -> list[str]:
    """The names of the layers that a charter adapts, as [model] targets has them."""
    return sorted({site.name.rpartition(".")[2] for site in sites})


def _refuse_other_state(found: str, expected: str) -> None:
    if expected and not found.startswith(expected.lower()):
        raise JournalError(
            f"the records add up to state {found[:16]}, not to {expected[:16]}",
            "this ledger lacks records, or has more",
        )


def _peer_named(name: str, ledger: Any) -> bytes:
    """The member whose key begins with `name`."""
    found = [peer for peer in ledger.members if peer.hex().startswith(name.lower())]
    if len(found) != 1 or len(name) < 4:
        raise ConfigError(
            f"--without {name}: {len(found)} members have such a key",
            "give the first digits of one member's key",
        )
    peer: bytes = found[0]
    return peer
