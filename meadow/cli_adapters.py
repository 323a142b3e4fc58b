"""`meadow adapters …`: the registry of signed adapters."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .display import bytes_text
from .errors import ConfigError, MeadowError, RegistryError

Add = Callable[..., argparse.ArgumentParser]
_PROD = "prod"
_REFERENCE = "NAME, NAME@ALIAS, NAME@v7 or NAME@sha256:..."


def add_commands(commands: Any, add: Add) -> None:
    """The sub-commands of `meadow adapters`; `add(commands, name, run, about)` makes one."""
    _on_registry(commands, add, "list", _list, "list adapters, versions and aliases").add_argument(
        "name", nargs="?", default=""
    )
    _on_version(commands, add, "show", _show, "all that is stated of a version, verified")
    verify = _on_registry(commands, add, "verify", _verify, "check versions as their files are now")
    verify.add_argument("version", nargs="*", metavar="VERSION", help=f"{_REFERENCE}; default: all")
    verify.add_argument("--base", default="", help="also check that they fit this base model")

    publish = _on_registry(
        commands, add, "publish", _publish, "add a run's adapter to the registry"
    )
    publish.add_argument("folder", type=Path, help="the run's, with adapter/ and manifest.json")
    publish.add_argument("name", help="NAME or TENANT/NAME")
    publish.add_argument("--alias", default="", help="also point this alias to it")
    _add_gates(publish, "also check that it fits this base model")

    promote = _on_version(commands, add, "promote", _promote, "point an alias to a version")
    promote.add_argument("--alias", default=_PROD)
    promote.add_argument("--why", default="", help="for the history")
    _add_gates(promote, "what it is measured on")
    rollback = _on_registry(commands, add, "rollback", _rollback, "point an alias to what it was")
    rollback.add_argument("name")
    rollback.add_argument("--alias", default=_PROD)
    rollback.add_argument("--why", default="", help="for the history")
    history = _on_registry(commands, add, "history", _history, "who changed what, when and why")
    history.add_argument("name", nargs="?", default="")
    history.add_argument("--alias", default="", help="this alias alone")
    _add_upkeep(commands, add)


def _add_upkeep(commands: Any, add: Add) -> None:
    """What keeps, deletes, carries and trusts."""
    pin = _on_version(commands, add, "pin", _pin, "keep a version, whatever gc finds")
    pin.add_argument("--remove", action="store_true", help="let gc decide again")
    pin.add_argument("--why", default="", help="for the history")
    gc = _on_registry(commands, add, "gc", _gc, "delete versions that nothing needs")
    gc.add_argument("--history", type=int, default=5, help="moves of each alias to keep")
    gc.add_argument("--days", type=float, default=7.0, help="keep what is younger")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")

    export = _on_registry(commands, add, "export", _export, "write versions into one file")
    export.add_argument("file", type=Path)
    export.add_argument("version", nargs="*", metavar="VERSION", help=_REFERENCE)
    export.add_argument("--all", action="store_true", help="all versions")
    bring = _on_registry(commands, add, "import", _import, "add the versions of an exported file")
    bring.add_argument("file", type=Path)
    bring.add_argument(
        "--trust", action="append", default=[], metavar="KEY-ID",
        help="trust this signer from now on; learn its id from the sender, not from the file",
    )  # fmt: skip
    trust = _on_registry(commands, add, "trust", _trust, "list trusted signers, add or remove one")
    trust.add_argument("key", nargs="?", type=Path, help="a public key (PEM) to trust")
    trust.add_argument("--label", default="", help="what to call it")
    trust.add_argument("--remove", default="", metavar="KEY-ID")
    trust.add_argument("--own", type=Path, metavar="FILE", help="write my own public key there")


def _on_registry(
    commands: Any, add: Add, name: str, run: Any, about: str
) -> argparse.ArgumentParser:
    parser = add(commands, name, run, about)
    parser.add_argument(
        "--registry", type=Path, metavar="DIR", help="default: registry/ beside this user's key"
    )
    return parser


def _on_version(
    commands: Any, add: Add, name: str, run: Any, about: str
) -> argparse.ArgumentParser:
    parser = _on_registry(commands, add, name, run, about)
    parser.add_argument("version", metavar="VERSION", help=_REFERENCE)
    return parser


def _add_gates(parser: argparse.ArgumentParser, base: str) -> None:
    parser.add_argument(
        "--max-increase", type=float, default=0.0, metavar="LOSS",
        help="by so much the held-out loss may get worse (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--descends", action="store_true", help="only what was trained from the current version"
    )
    parser.add_argument("--force", action="store_true", help="promote without any gate")
    parser.add_argument("--base", default="", help=f"a base model: {base}")
    parser.add_argument(
        "--held-out",
        default="",
        metavar="FILE",
        help="measure it on these rows (needs --base)",
    )
    parser.add_argument(
        "--canaries", default="", metavar="FILE",
        help="prompts whose answers have to pass, TOML or JSON lines (needs --base)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="as it is served",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=["none", "4bit", "8bit"], default="none", help="as it is served"
    )


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Any]:
    from .identity import own_identity
    from .server.registry import Registry, default_folder

    who = own_identity()
    with Registry.open(options.registry or default_folder(), who) as registry:
        yield registry


def _gate(options: argparse.Namespace, registry: Any) -> Any:
    from .server.measured_gate import MeasuredGate, Serving
    from .server.registry_gates import AllOf, LineageGate, LossGate

    measured = bool(options.held_out or options.canaries)
    if measured and not options.base:
        raise ConfigError("--held-out and --canaries need --base", "name the base to measure on")
    if options.force:
        return None
    gates: list[Any] = [LineageGate(options.descends)]
    how = Serving(options.base, options.dtype, options.quantize)
    if not options.held_out:
        gates.append(LossGate(options.max_increase, how.precision if measured else ""))
    if measured:
        files = options.held_out, options.canaries
        gates.append(MeasuredGate(registry, how, *files, options.max_increase))
    return AllOf(gates)


def _blueprint(base: str) -> Any:
    from .config import ModelConfig
    from .peft_adapters.blueprint import open_blueprint

    return open_blueprint(ModelConfig(base=base)) if base else None


def _list(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    with _opened(options) as registry:
        versions, aliases = registry.versions(options.name), registry.aliases(options.name)
        pins = registry.pins()
    rows = []
    for version in versions:
        place = version.name, version.number
        own = [a.alias for a in aliases if (a.version.name, a.version.number) == place]
        rows.append({**_plain(version), "aliases": own, "pinned": version.id in pins})
    table = _table("adapter", "aliases", "strategy", "rounds", "loss", "rank", "size", "digest")
    for row in rows:
        facts, marks = row["facts"], row["aliases"] + (["(pinned)"] if row["pinned"] else [])
        _add_row(
            table,
            *(f"{row['name']}@v{row['number']}", " ".join(marks), facts["strategy"]),
            *(str(facts["rounds"]), _loss(facts["loss"]), str(facts["rank"])),
            *(bytes_text(row["bytes"]), row["id"][:12]),
        )
    Console().print(table if rows else "no adapters yet; `meadow adapters publish` adds one")
    return rows


def _show(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.registry_changes import one_line

    with _opened(options) as registry:
        version = registry.resolve(options.version)
        labels = registry.labels()
        verified = registry.verify(version)
        aliases = [a.alias for a in registry.aliases(version.name) if a.version == version]
        folder = registry.folder / "versions" / version.id
    report = {
        **_plain(version),
        "aliases": aliases,
        "folder": str(folder),
        "signers": {key: labels[key] for key in verified.signers},
        **{key: getattr(verified, key) for key in ("rank", "scaling", "dtypes", "modules")},
        **asdict(verified.provenance),
        "name": version.name,
    }
    for key, value in report.items():
        if key != "facts":
            _say(f"{key:14} {one_line(str(value))}")
    return report


def _verify(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    blueprint, rows = _blueprint(options.base), []
    with _opened(options) as registry:
        versions = [registry.resolve(text) for text in options.version] or registry.versions()
        for version in versions:
            try:
                registry.verify(version, blueprint)
            except MeadowError as error:
                rows.append({"version": str(version), "id": version.id, "fault": str(error)})
            else:
                rows.append({"version": str(version), "id": version.id, "fault": ""})
    for row in rows:
        _say(f"{row['version']}  {row['id'][:12]}  {row['fault'] or 'verified'}")
    if faulty := [row["version"] for row in rows if row["fault"]]:
        raise RegistryError(f"{len(faulty)} of {len(rows)} do not verify: {', '.join(faulty)}")
    return rows


def _publish(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.registry_runs import publish_run

    blueprint = _blueprint(options.base)
    with _opened(options) as registry:
        version = publish_run(
            registry,
            options.folder,
            options.name,
            alias=options.alias,
            gate=_gate(options, registry),
            blueprint=blueprint,
        )
    at = f", and {options.alias} points to it" if options.alias else ""
    _say(f"published {version}{at}; digest {version.id}")
    return _plain(version)


def _promote(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with _opened(options) as registry:
        gate = _gate(options, registry)
        version = registry.promote(options.version, options.alias, gate, options.why)
    _say(f"{version.name}@{options.alias} points to {version}")
    return _plain(version)


def _rollback(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with _opened(options) as registry:
        version = registry.rollback(options.name, options.alias, options.why)
    _say(f"{version.name}@{options.alias} points to {version} again")
    return _plain(version)


def _history(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    if options.alias and not options.name:
        raise ConfigError("--alias needs a name", "meadow adapters history NAME --alias prod")
    with _opened(options) as registry:
        entries = registry.history(options.name, options.alias)
    table = _table("", "when", "who", "what", "of", "from", "to", "why")
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        of = f"{entry.name}@{entry.alias}" if entry.alias else entry.name
        _add_row(
            table,
            *(str(entry.revision), when, entry.who[:12], entry.kind, of),
            *(entry.before[:12], entry.after[:12], entry.why),
        )
    Console().print(table)
    return [asdict(entry) for entry in entries]


def _pin(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with _opened(options) as registry:
        change = registry.unpin if options.remove else registry.pin
        version = change(options.version, options.why)
    _say(f"{version} is {'no longer ' if options.remove else ''}pinned")
    return _plain(version)


def _gc(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.registry_gc import Retention

    if options.history < 0 or not options.days >= 0:
        raise ConfigError("--history and --days cannot be below 0")
    with _opened(options) as registry:
        retention = Retention(options.history, options.days)
        found = registry.collect(retention, dry_run=options.dry_run)
    verb = "would delete" if options.dry_run else "deleted"
    for version in found.versions:
        _say(f"{verb} {version}  {version.id[:12]}")
    _say(
        f"{verb} {len(found.versions)} versions, {bytes_text(found.bytes)}, and"
        f" {found.leftovers} leftovers; {len(found.in_use)} stay because they are in use"
    )
    return {
        "versions": [_plain(version) for version in found.versions],
        "bytes": found.bytes,
        "in_use": list(found.in_use),
        "leftovers": found.leftovers,
        "dry_run": options.dry_run,
    }


def _export(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .server.registry_archive import export_versions

    with _opened(options) as registry:
        named = registry.versions() if options.all else options.version
        versions = export_versions(registry, named, options.file)
    _say(f"wrote {options.file}: {', '.join(map(str, versions))}")
    return [_plain(version) for version in versions]


def _import(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .server.registry_archive import import_versions

    with _opened(options) as registry:
        versions = import_versions(registry, options.file, options.trust)
    for version in versions:
        _say(f"imported {version}  {version.id[:12]}")
    return [_plain(version) for version in versions]


def _trust(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .identity import own_identity, trust
    from .store import Disk

    with _opened(options) as registry:
        if options.own is not None:
            Disk().write(options.own, own_identity().public_pem)
            _say(f"wrote {options.own}; my key's id is {own_identity().key_id}")
        if options.key is not None:
            for public in trust(_read(options.key)).values():
                registry.trust(public, options.label or options.key.name)
        if options.remove:
            registry.distrust(options.remove)
        labels: dict[str, str] = registry.labels()
    for key, label in labels.items():
        _say(f"{key}  {label}")
    return {"trusted": labels}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _plain(version: Any) -> dict[str, Any]:
    return asdict(version)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Cells whose text may be a signer's or an operator's: shown as it is, on one line."""
    from .server.registry_changes import one_line

    table.add_row(*(escape(one_line(cell)) for cell in cells))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
