"""An adapter, its config and its signed manifest, read once and verified before it is used.

What was verified is what is used: the three files are read into memory, and everything that
follows speaks of those bytes.  `verify` goes from cheap to costly, and nothing is parsed before
its size, decoded before its signature, or believed before its digest:

    sizes; config and safetensors header; signature by a trusted key; digests of the files;
    the base's digest; names and shapes against the base's layers; every number finite
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ..canonical_json import canonical
from ..errors import AdapterError
from ..store import DRAFT, explained
from .adapter_reader import Adapter, Outline, check_fits, read_outline, read_tensors
from .blueprint import Blueprint
from .manifest import LARGEST as LARGEST_MANIFEST
from .manifest import MANIFEST, Provenance, open_manifest, provenance_of
from .peft_format import CONFIG, LARGEST_RANK, WEIGHTS
from .safetensors_header import LARGEST_JSON

_AGAIN = "get this adapter again"


@dataclass(frozen=True)
class Limits:
    """What is looked at; the rest is refused unread."""

    weights: int = 2**31  # bytes
    rank: int = LARGEST_RANK


@dataclass(frozen=True)
class Verified:
    """What is known of an adapter once it has passed every check."""

    id: str
    provenance: Provenance
    signers: tuple[str, ...]  # ids of the trusted keys that signed it
    rank: int
    scaling: float
    dtypes: tuple[str, ...]  # "F32", "F16", "BF16"
    modules: int  # adapted layers


@dataclass(frozen=True)
class SignedAdapter:
    """The bytes of the three files; nothing of them is believed before `verify`."""

    origin: Path
    """The adapter's folder, for messages."""
    config: bytes
    weights: bytes
    manifest: bytes
    limits: Limits = Limits()

    @classmethod
    def read(cls, folder: Path, manifest: Path, limits: Limits | None = None) -> SignedAdapter:
        """The two files of `folder`, and `manifest`, which may lie in it or elsewhere.

        Raises AdapterError for a file that is missing, too large, or no plain file, and for one
        that belongs to no adapter; pickle is refused by its name.
        """
        limits = limits or Limits()
        signed = manifest.name if manifest.parent == folder else ""
        _check_names(folder, {CONFIG, WEIGHTS, signed})
        return cls(
            folder,
            read_plain(folder / CONFIG, LARGEST_JSON),
            read_plain(folder / WEIGHTS, limits.weights),
            read_plain(manifest, LARGEST_MANIFEST),
            limits,
        )

    @property
    def id(self) -> str:
        """What names an adapter everywhere: SHA-256 over the canonical JSON of its two files'
        names, sizes and SHA-256."""
        sizes = {CONFIG: len(self.config), WEIGHTS: len(self.weights)}
        listed = [[name, sizes[name], digest] for name, digest in self._digests.items()]
        return _sha256(canonical(listed).encode())

    @property
    def manifest_digest(self) -> str:
        return hashlib.sha256(self.manifest).hexdigest()

    def verify(
        self, trusted: Mapping[str, Ed25519PublicKey], blueprint: Blueprint | None = None
    ) -> Verified:
        """Check everything, in the order that this module's page names.

        With a blueprint, the adapter must be one for that base.  Raises AdapterError, FormatError
        or IdentityError, which names the first thing wrong.
        """
        outline = self._outline()
        where = self.origin / MANIFEST
        manifest = open_manifest(self.manifest, trusted, where)
        self._check_digests(manifest.subject)
        provenance = provenance_of(manifest, where)
        if blueprint is not None:
            self._check_base(provenance, outline, blueprint)
        read_tensors(self.origin, self.weights)
        return Verified(
            self.id,
            provenance,
            manifest.signers,
            outline.rank,
            outline.scaling,
            outline.dtypes,
            len(outline.shapes) // 2,
        )

    def decode(self) -> Adapter:
        """The adapter itself.  Raises AdapterError."""
        outline = self._outline()
        tree = read_tensors(self.origin, self.weights)
        return Adapter(tree, outline.scaling, outline.rank, outline.base)

    def _outline(self) -> Outline:
        return read_outline(self.origin, self.config, self.weights, largest_rank=self.limits.rank)

    def _check_digests(self, signed: Mapping[str, str]) -> None:
        found = self._digests
        for name in sorted(found.keys() | signed.keys()):
            if name not in found:
                raise AdapterError(f"{self.origin}: {name[:80]!r} is signed and missing", _AGAIN)
            if signed.get(name) != found[name]:
                fault = "was changed after it was signed" if name in signed else "is not signed"
                raise AdapterError(f"{self.origin / name} {fault}", _AGAIN)

    def _check_base(self, stated: Provenance, outline: Outline, blueprint: Blueprint) -> None:
        if stated.base_digest != blueprint.digest:
            raise AdapterError(
                f"{self.origin} was trained on base {stated.base_digest[:12]!r},"
                f" and {blueprint.name} is {blueprint.digest[:12]!r}",
                "use the base that it was trained on",
            )
        check_fits(outline, blueprint.layers, self.origin)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {CONFIG: _sha256(self.config), WEIGHTS: _sha256(self.weights)}


def read_plain(path: Path, largest: int) -> bytes:
    """All of a plain file of at most so many bytes; links are not followed, nor pipes waited for.

    Raises AdapterError.
    """
    if not path.is_symlink() and not path.exists():
        raise AdapterError(f"{path} is missing", "it is not a complete signed adapter")
    if path.is_symlink() or not path.is_file():
        raise AdapterError(f"{path} is not a plain file", "an adapter holds nothing else")
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file, explained(path):
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # it was swapped after the look above
            raise AdapterError(f"{path} is not a plain file", "an adapter holds nothing else")
        if found.st_size > largest:
            raise AdapterError(f"{path} has {found.st_size} bytes, at most {largest} are read")
        data = file.read(largest + 1)
    if len(data) != found.st_size:
        raise AdapterError(f"{path} was changed while it was read", "try again")
    return data


def _check_names(folder: Path, known: Collection[str]) -> None:
    """Raise AdapterError where a folder holds anything but these and a crash's drafts."""
    if folder.is_symlink() or not folder.is_dir():
        raise AdapterError(f"{folder} is no folder", "name the folder of an adapter")
    with explained(folder):
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix != DRAFT)
    for name in names:
        if name not in known:
            pickle = name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
            hint = "a pickle is never opened" if pickle else "an adapter is two files"
            raise AdapterError(f"{folder / name} is no part of a signed adapter", hint)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
