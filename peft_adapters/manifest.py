"""The signed manifest: which adapter this is, and how it came to be, without any data.

`manifest.json`, beside the folder `adapter/`, is a DSSE envelope around an in-toto Statement v1
(https://github.com/in-toto/attestation, spec/v1).  Its subject is every file of the adapter with
its SHA-256; its predicate is the provenance below.  It names no participant and carries no text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .. import __version__
from ..errors import AdapterError, FormatError
from ..identity import Identity, verify
from ..store import DRAFT, Disk, explained
from ..wire import canonical

MANIFEST = "manifest.json"
ADAPTER = "adapter"
FORMAT = 1

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
PREDICATE = "meadow:federated-adapter/v1"

Statement = dict[str, Any]  # JSON

_LARGEST = 2**20  # bytes of a manifest
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How an adapter came to be.  Digests are SHA-256 in hexadecimal."""

    run_id: str
    base_digest: str  # of the base's stored tensors, before any quantisation
    config_digest: str  # of all settings
    strategy: str
    rounds: int
    participants: int  # counted, not named
    seed: int
    base_loss: float | None = None  # mean over all participants' held-out response tokens
    loss: float | None = None  # the same, after the last round
    parents: tuple[str, ...] = ()  # digests of the manifests that this run started from


def write_manifest(
    folder: Path, identity: Identity, provenance: Provenance, disk: Disk | None = None
) -> Path:
    """Sign the files of `folder/adapter` as they are now; the path of `folder/manifest.json`.

    The same files, key and provenance give the same bytes.  Raises AdapterError where there is no
    adapter, StorageError where the disk refuses.
    """
    subject = [
        {"name": name, "digest": {"sha256": digest}}
        for name, digest in _digests(folder / ADAPTER).items()
    ]
    statement = {
        "_type": STATEMENT,
        "subject": subject,
        "predicateType": PREDICATE,
        "predicate": _predicate(provenance),
    }
    envelope = identity.sign(PAYLOAD, canonical(statement).encode())
    (disk or Disk()).write(folder / MANIFEST, json.dumps(envelope, indent=1).encode() + b"\n")
    return folder / MANIFEST


def verify_manifest(folder: Path, trusted: Mapping[str, Ed25519PublicKey]) -> Statement:
    """The statement of `folder/manifest.json`, once a trusted key's signature on it holds and
    `folder/adapter` has exactly the files that it names.

    Raises IdentityError for a signature that is foreign or does not hold, FormatError for another
    format, AdapterError, naming the file, for one that was changed, added or removed.
    """
    payload = verify(_envelope(folder / MANIFEST), trusted, payload_type=PAYLOAD)
    statement = _statement(payload, folder / MANIFEST)
    signed = _subject(statement, folder / MANIFEST)
    found = _digests(folder / ADAPTER)
    for name in sorted(signed.keys() | found.keys()):
        if signed.get(name) != found.get(name):
            fault = "is missing" if name not in found else "is not signed"
            fault = "was changed" if name in found and name in signed else fault
            raise AdapterError(f"{folder / ADAPTER / name} {fault}", "get this adapter again")
    return statement


def _predicate(provenance: Provenance) -> dict[str, Any]:
    fields = asdict(provenance)
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[name] = None  # JSON has no such number
    return {"format": FORMAT, "meadow": __version__, **fields}


def _digests(adapter: Path) -> dict[str, str]:
    """SHA-256 of each file of an adapter, by name; drafts that a crash left do not count."""
    with explained(adapter):
        if not adapter.is_dir():
            raise AdapterError(f"{adapter} is no folder", "the manifest belongs beside an adapter")
        entries = sorted(entry for entry in adapter.iterdir() if entry.suffix != DRAFT)
    for entry in entries:
        if entry.is_symlink() or not entry.is_file():
            raise AdapterError(f"{entry} is not a plain file", "an adapter holds nothing else")
    if not entries:
        raise AdapterError(f"{adapter} is empty")
    return {entry.name: _digest(entry) for entry in entries}


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with explained(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def _envelope(path: Path) -> object:
    if not path.is_file():
        raise AdapterError(f"{path} is missing", "this adapter is not signed")
    with explained(path), path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise FormatError(f"{path} is larger than {_LARGEST} bytes")
    return _json(data, path)


def _json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} does not hold readable JSON") from error


def _statement(payload: bytes, path: Path) -> Statement:
    statement = _json(payload, path)
    match statement:
        case {
            "_type": str(kind),
            "predicateType": str(predicate),
            "predicate": {"format": version},
        }:
            if (kind, predicate, version) == (STATEMENT, PREDICATE, FORMAT):
                return dict(statement)
            raise FormatError(
                f"{path} has format {str(version)[:20]!r} of {predicate[:80]!r}, "
                f"this meadow reads format {FORMAT} of {PREDICATE!r}"
            )
    raise FormatError(f"{path} is signed, but states nothing about an adapter")


def _subject(statement: Statement, path: Path) -> dict[str, str]:
    """Digests by file name, as the statement gives them."""
    signed: dict[str, str] = {}
    entries = statement.get("subject")
    for entry in entries if isinstance(entries, list) and entries else [None]:
        match entry:
            case {"name": str(name), "digest": {"sha256": str(digest)}} if name not in signed:
                signed[name] = digest
            case _:
                raise FormatError(f"{path} does not say which files it is about")
    return signed
