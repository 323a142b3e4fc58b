"""A participant's text during a run: read once, pinned by its digest, and looked at again when its
files change.

The digest of the first reading is kept in the participant's folder.  Rows that were changed, added
or taken away afterwards make a different run; whether to go on with them is the participant's own
choice.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, JournalError, PolicyError
from ..store import Disk, explained
from .home import TEXT
from .policy import Policy
from .rows import Row, row_digest
from .sources import read_rows

FORMAT = 1

Fingerprint = tuple[object, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Rows, their digest, and how their files looked before they were read."""

    rows: tuple[Row, ...]
    digest: str
    fingerprint: Fingerprint


class ParticipantText:
    """The text of one participant in one run."""

    def __init__(self, folder: Path, run: str, chunk: int, disk: Disk) -> None:
        self._path, self._run, self._chunk, self._disk = folder / TEXT, run, chunk, disk
        self._text: Text | None = None

    def current(self, policy: Policy) -> Text:
        """The text as it is now; read again where its files look different.

        Raises PolicyError where it is not the text that the run began with and the policy does
        not accept that, DataError where it cannot be read.
        """
        found = fingerprint(policy.data)
        if self._text is None or self._text.fingerprint != found:
            text = self._read(policy.data, found)
            self._pin(text, policy)
            self._text = text
        return self._text

    def _read(self, sources: Sequence[str], found: Fingerprint) -> Text:
        if not sources:
            raise ConfigError("policy.toml names no text to train on", 'data = ["..."]')
        rows = tuple(read_rows(sources, self._chunk))
        return Text(rows, text_digest(rows), found)

    def _pin(self, text: Text, policy: Policy) -> None:
        pinned = self._pinned()
        if pinned == text.digest:
            return
        if pinned is not None and policy.data_changes == "refuse":
            raise PolicyError(
                "the participant's text has changed since the run began",
                'restore it, or set data_changes = "accept" in policy.toml',
            )
        if pinned is not None:
            log.warning("the text has changed during the run; policy.toml accepts that")
        pin = {"format": FORMAT, "run": self._run, "digest": text.digest}
        self._disk.write(self._path, json.dumps(pin).encode(), 0o600)

    def _pinned(self) -> str | None:
        """The digest of the text that this run began with, if it has begun."""
        with explained(self._path):
            if not self._path.exists():
                return None
            data = self._path.read_bytes()
        try:
            match json.loads(data):
                case {"format": 1, "run": str(run), "digest": str(digest)}:
                    return digest if run == self._run else None
        except ValueError:
            pass  # named below
        raise JournalError(f"{self._path} is damaged", "delete it if the text is unchanged")


def text_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what is trained on and held out, in its order; whose it is does not count."""
    digest = hashlib.sha256(b"meadow/text/v1\0")
    for row in rows:
        digest.update(row_digest(row) + row.split.encode() + b"\0")
    return digest.hexdigest()


def fingerprint(sources: Sequence[str]) -> Fingerprint:
    """Names, sizes and times of all files of the sources: cheap, and never equal by accident.

    What a hub or a library holds has none and is read once.
    """
    return (*sources, *(_looks(path) for source in sources for path in _files(source)))


def is_missing(source: str) -> bool:
    """Whether a source is a path at which there is no file."""
    path = Path(source.removeprefix("datasets:"))
    return path.is_absolute() and not any(True for _ in _files(source))


def _files(source: str) -> Iterator[Path]:
    path = Path(source.removeprefix("datasets:")).expanduser()
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        yield path
    elif glob.has_magic(str(path)):
        yield from map(Path, sorted(glob.glob(str(path), recursive=True)))


def _looks(path: Path) -> tuple[object, ...]:
    with explained(path):
        found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
