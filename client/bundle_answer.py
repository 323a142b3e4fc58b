"""Which answers to get-fab pass: the one bundle that this machine's meadow built itself.

A bundle is code that a SuperNode would run.  The one that travels names modules that are installed
anyway, so that its bytes are known beforehand, and any other is refused.

The answer is protobuf (flwr/proto/fab.proto): GetFabResponse {fab = 1: Fab {hash_str = 1: string,
content = 2: bytes, verifications = 3: map}}.  Every field may come once at most: of a repeated one,
readers of protobuf take the last or merge them, and two readers would not see the same.
"""

from __future__ import annotations

import hashlib

_FAB, _HASH, _CONTENT, _VERIFICATIONS = 1, 1, 2, 3
_LENGTH_DELIMITED = 2


def carries_exactly(answer: bytes, bundle: bytes) -> bool:
    """Whether an answer hands out `bundle` under its own digest, and nothing else."""
    try:
        outer = _fields(answer, repeatable=frozenset())
        if outer.keys() != {_FAB}:
            return False
        fab = _fields(outer[_FAB], repeatable=frozenset({_VERIFICATIONS}))
    except ValueError:
        return False
    digest = hashlib.sha256(bundle).hexdigest().encode()
    known = fab.keys() <= {_HASH, _CONTENT, _VERIFICATIONS}
    return known and fab.get(_HASH) == digest and fab.get(_CONTENT) == bundle


def _fields(message: bytes, repeatable: frozenset[int]) -> dict[int, bytes]:
    """The fields of a message that has only length-delimited ones.  ValueError for any other."""
    fields: dict[int, bytes] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        size, at = _varint(message, at)
        if kind != _LENGTH_DELIMITED or size > len(message) - at:
            raise ValueError("not a length-delimited field")
        if number in fields and number not in repeatable:
            raise ValueError("a field comes twice")
        fields[number] = message[at : at + size]
        at += size
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, least significant first, and where it ends."""
    value = 0
    for place in range(5):  # 35 bits hold every size of a message
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut off or too long")
