"""The signed manifest: which adapter this is, and how it came to be, without any data.

`manifest.json`, beside the folder `adapter/`, is a DSSE envelope around an in-toto Statement v1
(https://github.com/in-toto/attestation, spec/v1).  Its subject is every file of the adapter with
its SHA-256; its predicate is the provenance below.  It names no participant and carries no text.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .. import __version__
from ..canonical_json import canonical
from ..errors import AdapterError, FormatError
from ..identity import Identity, verify
from ..store import DRAFT, Disk, explained

MANIFEST = "manifest.json"
ADAPTER = "adapter"
FORMAT = 1

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD = "application/vnd.in-toto+json"
PREDICATE = "meadow:federated-adapter/v1"

Statement = dict[str, Any]  # JSON

LARGEST = 2**20  # bytes of a manifest
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How an adapter came to be.  Digests are SHA-256 in hexadecimal."""

    run_id: str
    base_digest: str  # of the base's stored tensors, before any quantisation
    config_digest: str  # of all settings
    strategy: str
    rounds: int  # that it has been trained for
    participants: int  # counted, not named
    seed: int
    base_loss: float | None = None  # mean over all participants' held-out response tokens
    loss: float | None = None  # the same, after these rounds
    dtype: str = ""  # precision in which those two were measured: "float32", "bfloat16+4bit"; "": ?
    held_out_rows: int | None = None  # on which they were measured; None where nobody knows them
    held_out_digest: str = ""  # of these rows' tokens; equal digests are equal rows
    parents: tuple[str, ...] = ()  # `SignedAdapter.id` of the adapters that this run started from
    evaluations: Mapping[str, float] = field(default_factory=dict)  # mean loss by a test's name
    privacy: str = "none"  # what was spent; "none": no differential privacy is claimed
    name: str = ""  # under which it may be published; "" for any


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
    manifest = open_manifest(_read(folder / MANIFEST), trusted, folder / MANIFEST)
    signed = manifest.subject
    found = _digests(folder / ADAPTER)
    for name in sorted(signed.keys() | found.keys()):
        if signed.get(name) != found.get(name):
            fault = "is missing" if name not in found else "is not signed"
            fault = "was changed" if name in found and name in signed else fault
            raise AdapterError(f"{folder / ADAPTER / name} {fault}", "get this adapter again")
    return manifest.statement


@dataclass(frozen=True)
class Manifest:
    """A manifest on which a trusted key's signature holds."""

    statement: Statement
    subject: Mapping[str, str]  # SHA-256 of each file, by its name
    signers: tuple[str, ...]  # ids of the trusted keys that signed it


def open_manifest(
    data: bytes, trusted: Mapping[str, Ed25519PublicKey], path: Path | str
) -> Manifest:
    """A manifest from its bytes, read from `path`.  Raises IdentityError or FormatError."""
    if len(data) > LARGEST:
        raise FormatError(f"{path} is larger than {LARGEST} bytes")
    envelope = _json(data, path)
    statement = _statement(verify(envelope, trusted, payload_type=PAYLOAD), path)
    signed = {entry["keyid"] for entry in envelope["signatures"]}
    return Manifest(statement, _subject(statement, path), tuple(sorted(signed & trusted.keys())))


def provenance_of(manifest: Manifest, path: Path | str) -> Provenance:
    """What a manifest states, as the types that it should have.  Raises FormatError.

    What this meadow does not know is left aside; what an older one did not state has its default.
    """
    stated = manifest.statement["predicate"]
    values: dict[str, Any] = {}
    for part in fields(Provenance):
        required = part.default is MISSING and part.default_factory is MISSING
        if part.name not in stated and not required:
            continue
        value = stated.get(part.name)
        if not _HAS_TYPE[str(part.type)](value):
            raise FormatError(f"{path} states no usable {part.name}", "get this adapter again")
        values[part.name] = tuple(value) if isinstance(value, list) else value
    return Provenance(**values)


def _is_number(value: Any) -> bool:
    """A finite number; JSON readers take NaN for one as well."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


_HAS_TYPE: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "int | None": lambda value: value is None or type(value) is int,
    "float | None": lambda value: value is None or _is_number(value),
    "tuple[str, ...]": lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
    "Mapping[str, float]": lambda value: (
        isinstance(value, dict) and all(map(_is_number, value.values()))
    ),
}


def _predicate(provenance: Provenance) -> dict[str, Any]:
    values = asdict(provenance)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None  # JSON has no such number
    tests = provenance.evaluations.items()
    values["evaluations"] = {name: loss for name, loss in tests if math.isfinite(loss)}
    return {"format": FORMAT, "meadow": __version__, **values}


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


def _read(path: Path) -> bytes:
    """What is more than the largest manifest is not read to its end."""
    if not path.is_file():
        raise AdapterError(f"{path} is missing", "this adapter is not signed")
    with explained(path), path.open("rb") as file:
        return file.read(LARGEST + 1)


def _json(data: bytes, path: Path | str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} does not hold readable JSON") from error


def _statement(payload: bytes, path: Path | str) -> Statement:
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


def _subject(statement: Statement, path: Path | str) -> dict[str, str]:
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
