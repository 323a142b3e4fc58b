"""A participant's folder for one coordinator: what is in it, and that it is nobody else's."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import ConfigError, IdentityError
from ..store import explained
from ..terms import Terms

MEMBERSHIP = "membership.json"
MEMBERSHIP_LOCK = "membership.lock"
FLOWER_KEY = "flower-key"
FORWARDER_AUTHORITY = "forwarder-authority.pem"
TERMS = "terms.json"
POLICY = "policy.toml"
OUTGOING = "outgoing.jsonl"
OUTBOX = "outbox"
TEXT = "text.json"
SOCKET = "trainer.sock"
PAUSED = "paused"
LOCK = "daemon.lock"
"""Held while the participant's daemon runs."""


def require_private(folder: Path) -> None:
    """Raise IdentityError unless only its owner can enter the folder."""
    with explained(folder):
        mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(f"{folder} is open to others (mode {mode:o})", f"chmod 700 {folder}")


def read_text(path: Path) -> str:
    """A small file's text.  Raises ConfigError where there is none, or no text in it."""
    with explained(path):
        try:
            return path.read_bytes().decode()
        except FileNotFoundError as error:
            raise ConfigError(f"there is no {path}", "`meadow client join` makes it") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text") from error


def terms_in(folder: Path) -> Terms:
    """The terms that a participant's folder is for.  Raises FormatError, or ConfigError where there
    are none."""
    return Terms.parse(read_text(folder / TERMS))
