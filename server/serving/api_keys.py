"""Keys by which callers are known: a file that holds their digests, and never a key.

    {"format": 1, "keys": [{"id", "name", "digest", "scopes", "per_minute", "at_once"}, ...]}

A key is `mdw_ID_SECRET`; its secret has 256 random bits, so that one SHA-256 keeps it.
"""

from __future__ import annotations

import hashlib
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import ConfigError
from ...file_lock import own_turn
from ...store import Disk, explained

FORMAT: Literal[1] = 1
Scope = Literal["inference", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "mdw"
_OWNER_ONLY = 0o600
_LONGEST_NAME = 64


class ApiKey(BaseModel):
    """What is known of a key; 0 is no limit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str
    name: str
    digest: str
    scopes: tuple[Scope, ...]
    per_minute: int = Field(default=0, ge=0)
    """Requests."""
    at_once: int = Field(default=0, ge=0)
    """Answers that are being made: a request for three of them counts three."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    keys: list[ApiKey]


def key_digest(key: str) -> str:
    """What the file keeps of a key."""
    return hashlib.sha256(b"meadow/api key/v1\0" + key.encode()).hexdigest()


def key_id(key: str) -> str:
    """The part of a key that is no secret; "" for what cannot be one."""
    match key.split("_"):
        case [prefix, id, _] if prefix == _PREFIX:
            return id
    return ""


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError for a file that cannot be used, or that others may write."""
    with explained(path):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file of keys", "`meadow keys add` makes one")
        mode, text = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    if mode & 0o022:
        raise ConfigError(f"{path} can be written by others (mode {mode:o})", f"chmod 600 {path}")
    try:
        keys = _File.model_validate_json(text).keys
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path} is no file of keys: {place or 'it'}: {first['msg']}") from None
    if len({key.id for key in keys}) != len(keys):
        raise ConfigError(f"{path} is no file of keys: two have one id")
    return keys


def add_key(
    path: Path, name: str, scopes: Sequence[Scope], per_minute: int = 0, at_once: int = 0
) -> str:
    """Make a key; its text, which is kept nowhere.  Raises ConfigError for a name in use."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"{name[:80]!r} cannot be a key's name", "1 to 64 printable characters")
    id = secrets.token_hex(6)
    text = f"{_PREFIX}_{id}_{secrets.token_hex(32)}"
    in_order = tuple(scope for scope in SCOPES if scope in scopes)
    added = ApiKey(
        id=id, name=name, digest=key_digest(text), scopes=in_order,
        per_minute=per_minute, at_once=at_once,
    )  # fmt: skip

    def add(keys: list[ApiKey]) -> list[ApiKey]:
        if any(key.name == name for key in keys):
            raise ConfigError(f"there is a key called {name!r}", "revoke it first")
        return [*keys, added]

    _change(path, add)
    return text


def revoke_key(path: Path, name: str) -> None:
    """A server that runs refuses it from its next request on."""

    def revoke(keys: list[ApiKey]) -> list[ApiKey]:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ConfigError(f"there is no key called {name[:80]!r}", "`meadow keys list`")
        return left

    read_keys(path)  # a file that is not there is not made
    _change(path, revoke)


def _change(path: Path, change: Callable[[list[ApiKey]], list[ApiKey]]) -> None:
    """One process at a time."""
    disk = Disk()
    disk.folder(path.parent)
    with own_turn(path.with_name(path.name + ".lock")):
        keys = change(read_keys(path) if path.exists() else [])
        text = _File(keys=keys).model_dump_json(indent=1) + "\n"
        disk.write(path, text.encode(), _OWNER_ONLY)
