"""Silos: what each participant trains on, and what it holds out.

Everything here is a pure function of the rows and the settings, so that every process of a run
sees the same silos.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import DataError
from .partition import NATURAL, share_out
from .rows import Row, row_digest
from .sources import read_rows

HELD_OUT = 0.2
"""Share of the rows without `split` that is held out."""


@dataclass(frozen=True)
class Silo:
    """One participant's rows.  `held_out` is empty where there is nothing to hold out."""

    client: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def load_silos(
    source: str | Sequence[str],
    *,
    partition: str = NATURAL,
    participants: int = 0,
    alpha: float = 0.5,
    seed: int = 0,
    chunk: int = 600,
    train_rows: int = 0,
    held_out_rows: int = 0,
) -> list[Silo]:
    """The participants of a run, sorted by name.

    `source` is read by `sources.read_rows`; plain files are cut into pieces of about `chunk`
    characters.  A natural partition takes the clients that the rows name, or, unless it is 0, the
    `participants` with most rows; the others share all rows out to as many, by `seed` and `alpha`.
    `train_rows` and `held_out_rows` cap a participant's rows (0: all).

    Raises DataError on text that cannot be read and on a participant without training rows, and
    ConfigError on a partition that doesn't exist or can't be made.
    """
    rows = read_rows(source, chunk)
    if partition == NATURAL:
        groups = _natural(rows, participants)
    else:
        groups = _artificial(rows, partition, participants, alpha, seed)
    return [silo_of(client, groups[client], train_rows, held_out_rows) for client in sorted(groups)]


def silos_of(config: Config) -> list[Silo]:
    """The participants that a run's config describes: the same in every process of the run."""
    data = config.data
    return load_silos(
        data.source,
        partition=data.partition,
        participants=data.participants,
        alpha=data.dirichlet_alpha,
        seed=config.rounds.seed,
        chunk=data.chunk,
        train_rows=data.train_rows,
        held_out_rows=data.held_out_rows,
    )


def hold_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """One participant's (training rows, held-out rows), in their order.

    A row that names its split goes there, and so do its exact duplicates.  Of the others, a fifth
    is held out: those with the lowest SHA-256.
    """
    keys = [row_digest(row) for row in rows]
    sides = {key: row.split for row, key in zip(rows, keys, strict=True) if row.split}
    held_out = _lowest_fifth(Counter(key for key in keys if key not in sides))
    train: list[Row] = []
    test: list[Row] = []
    for row, key in zip(rows, keys, strict=True):
        side = row.split or sides.get(key) or ("test" if key in held_out else "train")
        (test if side == "test" else train).append(row)
    return train, test


def _lowest_fifth(copies: Counter[bytes]) -> set[bytes]:
    """Keys to hold out: a fifth of all copies, at least one key, and never the only one."""
    if len(copies) < 2:
        return set()
    room = max(1, round(HELD_OUT * copies.total()))
    taken = set()
    for key in sorted(copies):
        if copies[key] <= room:
            taken.add(key)
            room -= copies[key]
    return taken or {min(copies, key=lambda key: (copies[key], key))}


def _natural(rows: Sequence[Row], largest: int) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.client, []).append(row)
    ranked = sorted(groups, key=lambda client: (-len(groups[client]), client))
    return {client: groups[client] for client in ranked[: largest or None]}


def _artificial(
    rows: Sequence[Row], kind: str, clients: int, alpha: float, seed: int
) -> dict[str, list[Row]]:
    shares = share_out([row.label for row in rows], kind, clients, alpha, seed)
    width = len(str(clients - 1))
    return {
        f"client-{number:0{width}d}": [rows[row] for row in share]
        for number, share in enumerate(shares)
    }


def silo_of(client: str, rows: Sequence[Row], train_rows: int, held_out_rows: int) -> Silo:
    """The silo of one participant's rows.  Raises DataError where none are for training."""
    train, held_out = hold_out(rows)
    if not train:
        hint = "all its rows say split = test; give it rows to train on, or leave it out"
        raise DataError(f"participant {client!r} has no training rows", hint)
    return Silo(client, _cap(train, train_rows), _cap(held_out, held_out_rows))


def _cap(rows: Sequence[Row], limit: int) -> tuple[Row, ...]:
    """At most `limit` rows (0: all), chosen by hash and left in their order."""
    if not limit:
        return tuple(rows)
    # Salted: the plain digest already decided who is held out.
    order = [hashlib.sha256(b"meadow/cap/" + row_digest(row)).digest() for row in rows]
    chosen = sorted(range(len(rows)), key=lambda row: (order[row], row))[:limit]
    return tuple(rows[row] for row in sorted(chosen))
