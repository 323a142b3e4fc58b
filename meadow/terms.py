"""What a participant approves: the terms of one run, as its coordinator states them.

    {"format": 1, "run": run id, "config": the run's settings but for [data] source,
     "config_digest", "base_digest", "bundle": digest of the Flower bundle,
     "coordinator": raw Ed25519 public key, "meadow": version}

All digests and keys are in hexadecimal.  The terms' own digest is the SHA-256 of their canonical
JSON; a participant's policy holds the one that was approved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import __version__
from .canonical_json import canonical
from .config import Config, from_json, to_json
from .errors import ConfigError, FormatError
from .identity import Identity
from .store import digest_of

FORMAT = 1

_HEX = re.compile("[0-9a-f]{1,64}")
_IN_HEX = ("run", "config_digest", "base_digest", "bundle", "coordinator")
_SAME = "install the coordinator's version of meadow"


def draft(
    config: Config, run_id: str, base_digest: str, bundle: str, coordinator: Identity
) -> dict[str, Any]:
    """The terms' JSON, as a coordinator states them."""
    shared = config.shared()
    return {
        "format": FORMAT,
        "run": run_id,
        "config": to_json(shared),
        "config_digest": shared.digest(),
        "base_digest": base_digest,
        "bundle": bundle,
        "coordinator": coordinator.public.public_bytes_raw().hex(),
        "meadow": __version__,
    }


def fields_of(data: str | bytes) -> dict[str, Any]:
    """The terms' JSON, whichever version of meadow wrote it; run, digests and key are sound.

    Raises FormatError for what are no terms, or terms of another format.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError("the terms are not JSON") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise FormatError("the terms are not those of a run")
    if fields["format"] != FORMAT:
        found = fields["format"]
        raise FormatError(f"the terms have format {found!r}, this meadow reads {FORMAT}", _SAME)
    for name in _IN_HEX:
        _require_hex(fields, name)
    return fields


@dataclass(frozen=True)
class Terms:
    """The terms of a run, checked for their form."""

    run: str
    config: Config
    config_digest: str
    base_digest: str
    bundle: str
    coordinator: str
    meadow: str
    digest: str

    @classmethod
    def parse(cls, data: str | bytes) -> Terms:
        """Raises FormatError for what are no terms, terms that contradict themselves, and those of
        another version of meadow."""
        fields = fields_of(data)
        _require_release(fields.get("meadow"))
        texts = {name: fields[name] for name in (*_IN_HEX, "meadow")}
        config = _config(fields.get("config"))
        if config.shared().digest() != texts["config_digest"]:
            raise FormatError("the terms' settings are not those of their config_digest", _SAME)
        return cls(**texts, config=config, digest=_digest(fields))


def _require_hex(fields: Mapping[str, Any], name: str) -> None:
    value = fields.get(name)
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise FormatError(f"the terms' {name} is not in hexadecimal")


def _require_release(version: object) -> None:
    if not isinstance(version, str) or _release(version) != _release(__version__):
        raise FormatError(f"the run is of meadow {version!r}, this is {__version__}", _SAME)


def _release(version: str) -> list[str]:
    """Major and minor: within these, messages stay as they are."""
    return version.split(".")[:2]


def _config(tables: object) -> Config:
    if not isinstance(tables, dict):
        raise FormatError("the terms have no config")
    try:
        return from_json(tables, "the terms")
    except ConfigError as error:
        raise FormatError(error.message, error.hint) from error


def _digest(fields: Mapping[str, Any]) -> str:
    try:
        return digest_of(canonical(fields).encode())
    except ValueError as error:
        raise FormatError("the terms hold a number or text that has no canonical form") from error
