"""The rules by which a participant's standing changes, each inside one transaction.

Every change leaves a note in the audit trail, in the same transaction; asking again for what is
so already changes nothing and leaves none.
"""

from __future__ import annotations

import re
import sqlite3

from ..errors import InvitationError, RosterError
from .participant import Participant, Status, find
from .roster_notes import append_note

_NEW_INVITATION = "ask the operator for a new invitation"
_OTHER_KEY = "make a new key and ask the operator for a new invitation"

NODE_GIVEN = re.compile("node ([0-9]+)")
"""The text of a note that somebody was approved."""


class Changes:
    """What one transaction does to the roster, at the time `now` (Unix seconds)."""

    def __init__(self, database: sqlite3.Connection, now: float) -> None:
        self._db = database
        self._now = now

    def invite(self, name: str, token: bytes, expires: float) -> None:
        """Open an invitation (its token hashed), in place of one, or of a revoked participant."""
        known = self._by_name(name)
        if known is not None and known.status in ("approved", "suspended"):
            raise RosterError(
                f"{name} is enrolled and {known.status}", f"revoke {name} first, or invite another"
            )
        if known is not None and known.status == "revoked" and known.key:
            self._retire(known.key, None)
        row = (name, "invited", token, expires)
        self._db.execute("DELETE FROM participants WHERE name = ?", (name,))
        self._db.execute(
            "INSERT INTO participants (name, status, token, token_expires) VALUES (?, ?, ?, ?)", row
        )
        self._tell("invited", self._named(name), "anew" if known else "")

    def enrol(self, token: bytes, key: bytes, flower_key: str) -> Participant:
        """Bind keys to the name of the invitation that `token` (hashed) opens, once."""
        rows = self._db.execute(
            "SELECT name, token_expires FROM participants WHERE token = ?", (token,)
        )
        name, expires = rows.fetchone() or ("", 0.0)
        if not name:
            raise InvitationError("this invitation is unknown or was replaced", _NEW_INVITATION)
        invited = self._named(name)
        if invited.key:
            return _same_keys(invited, key, flower_key)
        if invited.status != "invited" or self._now >= expires:
            ended = "has expired" if invited.status == "invited" else "was revoked"
            raise InvitationError(f"this invitation {ended}", _NEW_INVITATION)
        if self._was_used(key) or find(self._db, "WHERE flower_key = ?", flower_key):
            raise InvitationError("this key is in use under another name, or was", _OTHER_KEY)
        self._set(name, key=key, flower_key=flower_key, status="pending", enrolled=self._now)
        return self._tell("enrolled", self._named(name))

    def approve(self, name: str, node_id: int) -> Participant:
        """From pending to approved, under Flower's id."""
        known = self._named(name)
        if known.status == "approved" and known.node_id == node_id:
            return known
        if known.status != "pending":
            hint = "it has to enrol first" if known.status == "invited" else "see its status"
            raise RosterError(f"{name} is {known.status}, not waiting for approval", hint)
        if not 0 < node_id < 2**64:
            raise RosterError(f"{node_id} cannot be a node of Flower's")
        if find(self._db, "WHERE node_id = ?", str(node_id)):
            raise RosterError(f"Flower's node {node_id} is another participant already")
        self._set(name, status="approved", node_id=str(node_id))
        return self._tell("approved", self._named(name), f"node {node_id}")

    def move(self, name: str, before: Status, after: Status, kind: str) -> Participant:
        """From one status to another, leaving a note of that kind."""
        known = self._named(name)
        if known.status == after:
            return known
        if known.status != before:
            raise RosterError(f"{name} is {known.status}", f"only who is {before} can be {kind}")
        self._set(name, status=after)
        return self._tell(kind, self._named(name))

    def revoke(self, name: str) -> Participant:
        """From anything to revoked."""
        known = self._named(name)
        if known.status == "revoked":
            return known
        self._set(name, status="revoked")
        return self._tell("revoked", self._named(name), f"was {known.status}")

    def rotate(self, old_key: bytes, new_key: bytes) -> Participant:
        """Replace a key; of a pair that was exchanged already, the participant as it stands."""
        query = "SELECT successor FROM retired_keys WHERE key = ?"
        retired = self._db.execute(query, (old_key,)).fetchone()
        heirs = find(self._db, "WHERE key = ?", new_key)
        if heirs and retired == (new_key,):
            return heirs[0]
        known = self.owner(old_key)
        if known.status != "approved":
            raise RosterError(f"{known.name} is {known.status} and cannot change its key")
        if self._was_used(new_key):
            raise RosterError("the new key is in use, or was", "make another one")
        self._retire(old_key, new_key)
        self._set(known.name, key=new_key, certificate_expires=0.0)
        return self._tell("rotated", self._named(known.name), f"was {known.fingerprint}")

    def update(self, key: bytes, **columns: float) -> None:
        """Set figures of a key's owner."""
        self._set(self.owner(key).name, **columns)

    def owner(self, key: bytes) -> Participant:
        """Whose key it is; RosterError where it is nobody's."""
        found = find(self._db, "WHERE key = ?", key)
        if not found:
            raise RosterError("this key belongs to no participant", _NEW_INVITATION)
        return found[0]

    def _by_name(self, name: str) -> Participant | None:
        return next(iter(find(self._db, "WHERE name = ?", name)), None)

    def _named(self, name: str) -> Participant:
        known = self._by_name(name)
        if known is None:
            raise RosterError(f"there is no participant {name!r}")
        return known

    def _was_used(self, key: bytes) -> bool:
        retired = self._db.execute("SELECT 1 FROM retired_keys WHERE key = ?", (key,)).fetchone()
        return retired is not None or bool(find(self._db, "WHERE key = ?", key))

    def _retire(self, key: bytes, successor: bytes | None) -> None:
        self._db.execute("INSERT INTO retired_keys VALUES (?, ?)", (key, successor))

    def _set(self, name: str, **columns: object) -> None:
        changes = ", ".join(f"{column} = ?" for column in columns)
        query = f"UPDATE participants SET {changes} WHERE name = ?"
        self._db.execute(query, (*columns.values(), name))

    def _tell(self, kind: str, about: Participant, text: str = "") -> Participant:
        """Leave a note; gives back whom it is about."""
        append_note(self._db, self._now, kind, about.name, about.key, text)
        return about


def _same_keys(known: Participant, key: bytes, flower_key: str) -> Participant:
    """The participant that used an invitation, where it is the same that asks again."""
    if key != known.key:
        raise InvitationError("this invitation was used already, by another key", _NEW_INVITATION)
    if flower_key != known.flower_key:
        raise InvitationError(
            "this invitation was used already, with another Flower key", _NEW_INVITATION
        )
    return known
