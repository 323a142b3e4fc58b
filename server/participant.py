"""One participant, and how the roster's database keeps it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from ..fingerprint import fingerprint

Status = Literal["invited", "pending", "approved", "suspended", "revoked"]

TABLES = (
    # a node id has 64 bits without a sign, more than SQLite's integers hold: TEXT
    "CREATE TABLE participants (name TEXT PRIMARY KEY, key BLOB UNIQUE, status TEXT NOT NULL,"
    " flower_key TEXT UNIQUE, node_id TEXT UNIQUE, enrolled REAL NOT NULL DEFAULT 0,"
    " seen REAL NOT NULL DEFAULT 0, certificate_expires REAL NOT NULL DEFAULT 0,"
    " token BLOB UNIQUE, token_expires REAL NOT NULL)",
    "CREATE TABLE retired_keys (key BLOB PRIMARY KEY, successor BLOB)",
)
_COLUMNS = "name, key, status, flower_key, node_id, enrolled, seen, certificate_expires"


@dataclass(frozen=True)
class Participant:
    """One row of the roster.  Times are Unix seconds, 0 where it has not happened."""

    name: str
    key: bytes
    """Raw Ed25519 public key, 32 bytes; b"" before enrolment."""
    status: Status
    flower_key: str
    """The P-384 public key (PEM) that its SuperNode uses; "" before enrolment."""
    node_id: int
    """What Flower calls it; 0 before approval."""
    enrolled: float
    seen: float
    certificate_expires: float

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


def find(database: sqlite3.Connection, where: str, *values: object) -> list[Participant]:
    """The participants that an SQL clause selects."""
    query = f"SELECT {_COLUMNS} FROM participants {where}"
    return [
        Participant(name, key or b"", status, flower_key or "", int(node_id or 0), *times)
        for name, key, status, flower_key, node_id, *times in database.execute(query, values)
    ]
