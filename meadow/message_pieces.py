"""A payload as pieces that each travel on their own.

Flower sends every record of a message as one object in one request, and the gateway takes no body
above 16 MiB.  So a payload is cut; the first piece is the record `meadow`, those after it are
`meadow/1`, `meadow/2`, ...  Imports no torch and no Flower.
"""

from __future__ import annotations

from collections.abc import Mapping

PIECE = 4 * 2**20
"""Bytes; Flower's own arrays travel in pieces of 5 MiB."""
_FIRST, _KEY = "meadow", "payload"


def cut(payload: bytes, piece: int = PIECE) -> dict[str, dict[str, bytes]]:
    """Record name to what it holds; an empty payload is one empty piece."""
    starts = range(0, max(1, len(payload)), piece)
    return {_name(at): {_KEY: payload[start : start + piece]} for at, start in enumerate(starts)}


def joined(records: Mapping[str, Mapping[str, object]]) -> bytes | None:
    """The payload of a message's records; None where they are not pieces, all of them, of one."""
    pieces = []
    for at in range(len(records)):
        piece = records.get(_name(at), {}).get(_KEY)
        if not isinstance(piece, bytes):
            return None
        pieces.append(piece)
    if len(pieces) == 1:
        return pieces[0]  # no copy
    return b"".join(pieces) if pieces else None


def _name(at: int) -> str:
    return f"{_FIRST}/{at}" if at else _FIRST
