"""Which answers to get-fab pass: the one bundle that this machine's meadow built itself.

A bundle is code that a SuperNode would run.  The one that travels names modules that are installed
anyway, so that its bytes are known beforehand, and any other is refused.

The answer is protobuf (flwr/proto/fab.proto): GetFabResponse {fab = 1: Fab {hash_str = 1: string,
content = 2: bytes, verifications = 3: map}}.  Every field may come once at most: of a repeated one,
readers of protobuf take the last or merge them, and two readers would not see the same.
"""

from __future__ import annotations

import hashlib

from ..protobuf_fields import fields

_FAB, _HASH, _CONTENT, _VERIFICATIONS = 1, 1, 2, 3


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
    """The fields of a message that has only texts and nested ones.  ValueError for any other."""
    found: dict[int, bytes] = {}
    for number, value in fields(message):
        if not isinstance(value, bytes):
            raise ValueError("a field is a number")
        if number in found and number not in repeatable:
            raise ValueError("a field comes twice")
        found[number] = value
    return found
