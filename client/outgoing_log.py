"""What left this machine: a log of hash-chained JSON lines, written before anything is sent.

A line is one message: what it was, its size and SHA-256, and the SHA-256 of the line before it, so
that an edit, a cut or a swap anywhere shows.  Beside the log lies its head, a copy of the newest
line under a seal of its own.  An entry is written to the head first, in one piece, and then
appended; so a log that was cut at its end shows as well, and a line that a crash tore in two is
completed from the head at the next start.

    {"format": 1, "number", "time", "previous", "run", "kind", "round", "bytes", "sha256",
     "received": bytes of the message that was answered, "repeat": the same bytes left before,
     "about": {...}}

An entry says that its bytes may have left; bytes without an entry did not.  The chain shows
changes to whoever noted an earlier head; somebody who can write both files can forge both anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import FormatError, JournalError
from ..store import Disk, digest_of, explained

FORMAT = 1
HEAD = ".head"
"""What the head's name ends in."""

Kind = Literal["train", "evaluate", "refusal"]

_GENESIS = "0" * 64
_OWNER_ONLY = 0o600
_SEAL = re.compile(rb"meadow outgoing (\d{1,9}) ([0-9a-f]{64})")
_HEX = re.compile("[0-9a-f]{64}")
_TYPES = {
    "format": int, "number": int, "time": float, "previous": str, "run": str, "kind": str,
    "round": int, "bytes": int, "sha256": str, "received": int, "repeat": bool, "about": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line."""

    number: int  # from 1
    time: float  # unix seconds
    previous: str
    run: str
    kind: Kind
    round: int
    bytes: int
    sha256: str
    received: int
    repeat: bool
    about: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Two entries with this in common are about the same bytes."""
        return self.run, self.kind, self.round, self.sha256


def line_of(entry: Entry) -> bytes:
    """An entry as it is written, without the line's end."""
    fields = {"format": FORMAT, **asdict(entry)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class OutgoingLog:
    """The log of one participant; one process writes it, any may read it meanwhile."""

    def __init__(
        self, path: Path, disk: Disk | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Open or begin a log, and complete a line that a crash tore: from the head.

        Raises JournalError where the log was changed, FormatError for another version's.
        """
        self.path, self._disk, self._clock = path, disk or Disk(), clock
        self._torn = True  # until it was read and found whole
        self._count, self._head = 0, _GENESIS
        self._sent: set[tuple[str, str, int, str]] = set()
        self._bytes: Counter[tuple[str, str, int]] = Counter()
        self._trained: dict[tuple[str, int], float] = {}
        self._open()

    @property
    def head(self) -> str:
        """SHA-256 of the newest line: who noted it can tell later that nothing was changed."""
        return self._head

    def append(
        self,
        kind: Kind,
        data: bytes,
        *,
        run: str,
        round: int,
        received: int,
        about: Mapping[str, Any],
    ) -> Entry:
        """Note that `data` is about to leave; durable on return.

        Raises StorageError where the disk refuses: the bytes must not leave then.
        """
        if self._torn:
            self._open()
        entry = Entry(
            self._count + 1, _milliseconds(self._clock()), self._head, run, kind, round, len(data),
            digest_of(data), received, False, about,
        )  # fmt: skip
        if entry.key in self._sent:
            entry = replace(entry, repeat=True)
        self._torn = True
        with _locked(self.path, fcntl.LOCK_EX):
            self._disk.write(_head_of(self.path), _sealed(line_of(entry)), _OWNER_ONLY)
            self._extend(line_of(entry) + b"\n")
        self._torn = False
        self._note(entry)
        return entry

    def sent(self, run: str, round: int) -> int:
        """Bytes of a round's answers so far, repeats included."""
        return self._bytes["sent", run, round]

    def received(self, run: str, round: int) -> int:
        """Bytes of the messages that were answered or refused in a round so far."""
        return self._bytes["received", run, round]

    def rounds_since(self, since: float, but: tuple[str, int]) -> int:
        """How many other (run, round) were trained for the first time after a unix time."""
        return sum(at > since for key, at in self._trained.items() if key != but)

    def _open(self) -> None:
        """Read the log anew, from nothing, and complete it."""
        if not self.path.exists() and not _head_of(self.path).exists():
            self._disk.write(self.path, b"", _OWNER_ONLY)
        self._count, self._head = 0, _GENESIS
        for known in (self._sent, self._bytes, self._trained):
            known.clear()
        with _locked(self.path, fcntl.LOCK_EX):
            entries, mended = _read(self.path)
        if mended is not None:
            self._disk.write(self.path, mended, _OWNER_ONLY)
        for entry in entries:
            self._note(entry)
        self._torn = False

    def _extend(self, data: bytes) -> None:
        with explained(self.path), open(self.path, "ab", buffering=0) as file:
            self._disk.fill(file, data)
            self._disk.sync(file)

    def _note(self, entry: Entry) -> None:
        self._count, self._head = entry.number, digest_of(line_of(entry))
        self._bytes["received", entry.run, entry.round] += entry.received
        if entry.kind == "refusal":
            return
        self._sent.add(entry.key)
        self._bytes["sent", entry.run, entry.round] += entry.bytes
        if entry.kind == "train":
            self._trained.setdefault((entry.run, entry.round), entry.time)


def read(path: Path) -> list[Entry]:
    """All entries of a log, oldest first.

    Raises JournalError, naming the line, where anything was changed, cut or torn, and FormatError
    for another version's log.
    """
    with _locked(path, fcntl.LOCK_SH):
        entries, mended = _read(path)
    if mended is not None:
        hint = "the head has the whole line; the trainer's next start completes it"
        raise JournalError(f"{path}: line {len(entries)} was torn by a crash, or cut", hint)
    return entries


def verify(path: Path, head: str = "") -> int:
    """How many entries a log has, if it is whole and, where a `head` was noted, still holds it.

    Raises as `read`.
    """
    entries = read(path)
    if head and head not in {_GENESIS, *(digest_of(line_of(entry)) for entry in entries)}:
        raise JournalError(f"{path} does not continue the log whose head was {head[:16]}", _KEEP)
    return len(entries)


_KEEP = "keep a copy, find out who changed it, then move it away to begin a new one"


def _milliseconds(seconds: float) -> float:
    """Rounded to these, and a float whatever the clock gives."""
    return round(float(seconds), 3)


def _read(path: Path) -> tuple[list[Entry], bytes | None]:
    """All entries, the head's included, and what the file should hold where a crash tore it."""
    data, line = path.read_bytes(), _read_head(_head_of(path))
    if not line:
        if data:
            raise _damaged(f"{path}: its head")
        return [], None
    head = _entry(line, f"{path}: the head")
    *lines, rest = data.split(b"\n", head.number - 1)
    if len(lines) < head.number - 1:
        raise _damaged(f"{path}: line {len(lines) + 1}")
    entries = [_entry(text, f"{path}: line {at}") for at, text in enumerate(lines, 1)] + [head]
    _require_chain(entries, path)
    whole = line + b"\n"
    if rest == whole:
        return entries, None
    if not _torn(rest, whole):
        raise _damaged(f"{path}: line {head.number}")
    return entries, data[: len(data) - len(rest)] + whole


def _torn(rest: bytes, whole: bytes) -> bool:
    """Whether a crash left this of a line: its beginning, with zeros where the file had grown
    before its content was on the disk."""
    return len(rest) <= len(whole) and all(a in (b, 0) for a, b in zip(rest, whole, strict=False))


def _require_chain(entries: Sequence[Entry], path: Path) -> None:
    previous = _GENESIS
    for number, entry in enumerate(entries, 1):
        if (entry.number, entry.previous) != (number, previous):
            raise _damaged(f"{path}: line {number} or the one before")
        previous = digest_of(line_of(entry))


def _entry(line: bytes, where: str) -> Entry:
    """The entry of a line, if it is, byte for byte, what `line_of` writes."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(where) from error
    if isinstance(fields, dict) and type(fields.get("format")) is int and fields["format"] > FORMAT:
        raise FormatError(f"{where} has format {fields['format']}, this meadow reads {FORMAT}")
    if not _well_formed(fields):
        raise _damaged(where)
    entry = Entry(**{name: value for name, value in fields.items() if name != "format"})
    if line_of(entry) != line:
        raise _damaged(where)
    return entry


def _well_formed(fields: object) -> bool:
    return (
        isinstance(fields, dict)
        and fields.keys() == _TYPES.keys()
        and all(type(fields[name]) is kind for name, kind in _TYPES.items())
        and fields["format"] == FORMAT
        and fields["kind"] in get_args(Kind)
        and bool(_HEX.fullmatch(fields["sha256"]))
    )


def _damaged(where: str) -> JournalError:
    return JournalError(f"{where} was changed, cut or moved", _KEEP)


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + HEAD)


def _sealed(line: bytes) -> bytes:
    return b"meadow outgoing %d %b\n%b" % (FORMAT, _digest(line), line)


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode()


def _read_head(path: Path) -> bytes:
    """The newest line, or nothing where none was ever written."""
    with explained(path):
        if not path.exists():
            return b""
        seal, _, line = path.read_bytes().partition(b"\n")
    found = _SEAL.fullmatch(seal)
    if found and int(found[1]) != FORMAT:
        raise FormatError(f"{path} has format {found[1].decode()}, this meadow reads {FORMAT}")
    if _sealed(line) != seal + b"\n" + line:
        raise _damaged(str(path))
    return line


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Nobody reads between an entry's two writes."""
    with explained(path):
        try:
            file = open(path, "rb")
        except FileNotFoundError as error:
            raise JournalError(f"{path} is missing", _KEEP) from error
    with file:
        fcntl.flock(file, how)
        yield
