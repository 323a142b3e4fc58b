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
from pathlib import Path
from typing import Any

from .. import __version__
from ..canonical_json import canonical
from ..config import Config, from_json
from ..errors import ConfigError, FormatError
from ..store import digest_of
from .home import read_text

FORMAT = 1

_HEX = re.compile("[0-9a-f]{1,64}")
_IN_HEX = ("run", "config_digest", "base_digest", "bundle", "coordinator")


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
        """Raises FormatError for what are no terms, or terms that contradict themselves."""
        fields = _fields(data)
        texts = {name: _hex(fields, name) for name in _IN_HEX}
        config = _config(fields.get("config"))
        if config.shared().digest() != texts["config_digest"]:
            raise FormatError("the terms' settings are not those of their config_digest", _SAME)
        return cls(**texts, config=config, meadow=str(fields["meadow"]), digest=_digest(fields))

    @classmethod
    def load(cls, path: Path) -> Terms:
        """Read `terms.json`.  Raises FormatError, or ConfigError where there is none."""
        return cls.parse(read_text(path))


_SAME = "install the coordinator's version of meadow"


def _fields(data: str | bytes) -> dict[str, Any]:
    """The terms' JSON, once its format and the version that wrote it are known."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError("the terms are not JSON") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise FormatError(f"the terms have format {found!r}, this meadow reads {FORMAT}", _SAME)
    version = fields.get("meadow")
    if not isinstance(version, str) or _release(version) != _release(__version__):
        raise FormatError(f"the run is of meadow {version!r}, this is {__version__}", _SAME)
    return fields


def _release(version: str) -> list[str]:
    """Major and minor: within these, messages stay as they are."""
    return version.split(".")[:2]


def _hex(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise FormatError(f"the terms' {name} is not in hexadecimal")
    return value


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
