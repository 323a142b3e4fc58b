"""Who takes part: participants, their keys, where they stand, and the coordinator's inbox.

A participant is its Ed25519 key; the operator gives it a name, and the two are bound when the
participant enrols with the token of its invitation:

    invited -> pending -> approved <-> suspended
    revoked, from any of them; a new invitation for the name begins again, with another key

A key that was revoked or replaced never comes back, under no name.

`roster.db` (SQLite) is shared by several processes: every answer is read from it anew, so that a
decision of the operator holds from the next request on.  Threads may share a Roster, whose one
connection lives on a thread of its own.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from ..closeable import Closeable
from ..errors import FormatError, InvitationError, JournalError, RosterError
from ..file_lock import own_turn
from ..invitation import TOKEN_BYTES
from ..participant_name import normal_name
from ..store import Disk, explained
from .participant import TABLES as PARTICIPANT_TABLES
from .participant import Participant, Status, find
from .roster_changes import NODE_GIVEN, Changes
from .roster_notes import TABLES as NOTE_TABLES
from .roster_notes import Note, append_note, read_notes

__all__ = ["FORMAT", "TOUCH_SECONDS", "Note", "Participant", "Roster", "Status"]

FORMAT = 1
TOUCH_SECONDS = 30.0
"""`seen` is written at most so often: it need not cost a commit per request."""

_T = TypeVar("_T")
_KEY_BYTES = 32
_LONGEST_FLOWER_KEY = 1000  # characters; ours have 215
_RESTORE = "restore the coordinator's folder from a backup"


class Roster(Closeable):
    """Made by `Roster.open`; close it, or use it in a `with` statement."""

    def __init__(self, path: Path, disk: Disk, clock: Callable[[], float]) -> None:
        self._path = path
        self._disk = disk
        self._clock = clock
        self._resources = ExitStack()
        self._thread: ThreadPoolExecutor
        self._db: sqlite3.Connection  # touched on that thread only

    @classmethod
    def open(
        cls, path: Path, disk: Disk | None = None, clock: Callable[[], float] = time.time
    ) -> Roster:
        """Create the roster at `path`, or go on with it; `clock` gives Unix seconds.

        Raises JournalError where it is damaged, FormatError for another format, StorageError where
        the disk refuses.
        """
        disk = disk or Disk()
        disk.folder(path.parent)
        roster = cls(path, disk, clock)
        with ExitStack() as resources:
            roster._thread = resources.enter_context(ThreadPoolExecutor(1, "meadow-roster"))
            roster._on_thread(roster._connect)
            resources.callback(lambda: roster._on_thread(roster._db.close))
            roster._resources = resources.pop_all()
        return roster

    def close(self) -> None:
        """Release the file.  Nothing depends on it: a roster that was not closed is as safe."""
        self._resources.close()

    # Enrolment

    def invite(self, name: str, expires_in_seconds: float) -> bytes:
        """A token (16 random bytes) with which one key may enrol as `name`; stored hashed.

        An invitation that is open, an enrolment that waits for approval and a revoked participant
        make way: the name is to be had once more.  Raises InvitationError for an impossible name,
        RosterError for a participant that is approved or suspended.
        """
        if not expires_in_seconds > 0:
            raise InvitationError("an invitation must hold for more than 0 seconds")
        name, token = normal_name(name), secrets.token_bytes(TOKEN_BYTES)
        expires = self._clock() + expires_in_seconds
        self._change(lambda changes: changes.invite(name, _hash(token), expires))
        return token

    def enrol(self, token: bytes, key: bytes, flower_key: str) -> Participant:
        """Bind a key (raw, 32 bytes) and its Flower key (P-384, PEM) to the token's name.

        The caller has made sure that who asks holds `key`.  The same token with the same keys
        gives the participant as it stands, also after the invitation's end.  Raises
        InvitationError for a token that is unknown, expired or used by another key, and for keys
        that are in use or were.
        """
        if len(key) != _KEY_BYTES:
            raise InvitationError(f"an identity key has {_KEY_BYTES} bytes, not {len(key)}")
        flower_key = _normal_flower_key(flower_key)
        return self._change(lambda changes: changes.enrol(_hash(token), key, flower_key))

    def approve(self, name: str, node_id: int) -> Participant:
        """Let in a participant whose fingerprint was compared; `node_id` is what Flower gave it.

        This and the next three raise RosterError for a name that is nobody's, or whose status does
        not allow it; asking again for what is so already is harmless.
        """
        return self._change(lambda changes: changes.approve(normal_name(name), node_id))

    def suspend(self, name: str) -> Participant:
        """Refuse an approved participant until it is resumed."""
        return self._move(name, "approved", "suspended", "suspended")

    def resume(self, name: str) -> Participant:
        """Let a suspended participant in again."""
        return self._move(name, "suspended", "approved", "resumed")

    def revoke(self, name: str) -> Participant:
        """Refuse a participant's key for good; an invitation that is open becomes void."""
        return self._change(lambda changes: changes.revoke(normal_name(name)))

    # Keys and certificates

    def rotate(self, old_key: bytes, new_key: bytes) -> Participant:
        """Put a new key (raw) in the old one's place; name, Flower key and history stay.

        The caller has made sure that who asks holds both.  Once this has returned the old key is
        nobody's; asked again for the same pair, it gives the participant as it stands.  Raises
        RosterError for an old key that is nobody's or not approved, and for a new one that is or
        was in use.
        """
        if len(new_key) != _KEY_BYTES:
            raise RosterError(f"an identity key has {_KEY_BYTES} bytes, not {len(new_key)}")
        return self._change(lambda changes: changes.rotate(old_key, new_key))

    def certified(self, key: bytes, expires: float) -> None:
        """Keep until when (Unix seconds) the newest certificate of a key holds."""
        self._change(lambda changes: changes.update(key, certificate_expires=expires))

    def touch(self, key: bytes) -> None:
        """The participant was heard of just now; exact to TOUCH_SECONDS."""
        known, now = self.by_key(key), self._clock()
        if known is None or abs(now - known.seen) >= TOUCH_SECONDS:
            self._change(lambda changes: changes.update(key, seen=now))

    # Questions

    def participants(self) -> list[Participant]:
        """Everybody, sorted by name."""
        return self._find("ORDER BY name")

    def nodes(self) -> set[int]:
        """Flower's id of every participant that was ever approved, also of those whose name another
        key has now."""
        told = (NODE_GIVEN.fullmatch(note.text) for note in self.notes() if note.kind == "approved")
        return {int(found[1]) for found in told if found}

    def by_key(self, key: bytes) -> Participant | None:
        """Whose key (raw) this is now; None for a stranger's, and for one that was replaced."""
        return next(iter(self._find("WHERE key = ?", key)), None)

    def by_name(self, name: str) -> Participant | None:
        return next(iter(self._find("WHERE name = ?", normal_name(name))), None)

    # The inbox

    def note(self, kind: str, key: bytes, text: str) -> Note:
        """Add a line to the coordinator's inbox; durable on return.

        `key` (raw) is of whom it comes, b"" for nobody; `text` may be anybody's and is made one
        printable line.  ValueError for a kind that is no short word in lower case.
        """
        known = self.by_key(key)
        name, now = known.name if known else "", self._clock()
        return self._transaction(lambda: append_note(self._db, now, kind, name, key, text))

    def withdraw(self, name: str) -> Note:
        """Ask in a participant's place that what it has contributed is retracted.

        Raises RosterError for who has never enrolled.
        """
        person = self.by_name(name)
        if person is None or not person.key:
            raise RosterError(
                f"{name} has not enrolled", "`meadow coordinator clients` lists names"
            )
        return self.note("withdraw", person.key, "by the operator")

    def notes(self, after_id: int = 0) -> list[Note]:
        """The lines after one, in order.  JournalError where they are not as they were written."""
        return self._on_thread(lambda: read_notes(self._db, self._path, after_id))

    # SQL

    def _move(self, name: str, before: Status, after: Status, kind: str) -> Participant:
        return self._change(lambda changes: changes.move(normal_name(name), before, after, kind))

    def _change(self, change: Callable[[Changes], _T]) -> _T:
        now = self._clock()
        return self._transaction(lambda: change(Changes(self._db, now)))

    def _find(self, where: str, *values: object) -> list[Participant]:
        return self._on_thread(lambda: find(self._db, where, *values))

    def _transaction(self, work: Callable[[], _T]) -> _T:
        def commit() -> _T:
            with self._disk.transaction(self._db, self._path):
                return work()

        return self._on_thread(commit)

    def _on_thread(self, work: Callable[[], _T]) -> _T:
        with explained(self._path):
            return self._thread.submit(work).result()

    # Opening

    def _connect(self) -> None:
        """One process at a time: SQLite does not wait where two turn on a database's log."""
        with own_turn(self._path.with_name(self._path.name + ".lock")):
            self._db = self._disk.connect(self._path)
            try:
                self._admit()
            except BaseException:
                self._db.close()
                raise

    def _admit(self) -> None:
        """Create the tables, or check that they are ours."""
        ((health,),) = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if health != "ok":
            raise JournalError(f"{self._path} is damaged: {health}", _RESTORE)
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version == 0 and not self._db.execute("SELECT name FROM sqlite_master").fetchall():
            with self._disk.transaction(self._db, self._path):
                for statement in (*PARTICIPANT_TABLES, *NOTE_TABLES):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {FORMAT}")
        elif version != FORMAT:
            raise FormatError(
                f"{self._path} has roster format {version}, this meadow reads {FORMAT}",
                "install the version of meadow that wrote it",
            )


def _hash(token: bytes) -> bytes:
    """What is kept of a token; 128 random bits need no salt."""
    return hashlib.sha256(b"meadow/invitation/v1\0" + token).digest()


def _normal_flower_key(text: str) -> str:
    """A Flower key in the one PEM text that is compared; InvitationError for another kind."""
    try:
        key = load_pem_public_key(text[:_LONGEST_FLOWER_KEY].encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvitationError("the Flower key is not a readable PEM public key") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise InvitationError("the Flower key is not an ECDSA key on P-384")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
