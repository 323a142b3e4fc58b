"""What a SuperNode says when it goes, for one that was killed and could not.

A SuperLink takes a SuperNode for present until its heartbeats have been missing for a minute, and
admits it no second time before that.  The message is protobuf (flwr/proto/fleet.proto):
DeactivateNodeRequest {node_id = 1: uint64}.
"""

from __future__ import annotations

_NODE_ID = b"\x08"  # field 1, a varint


def departure(node_id: int) -> bytes:
    """The body of a request to `deactivate-node`."""
    groups = bytearray()
    while node_id > 0x7F:
        groups.append(node_id & 0x7F | 0x80)
        node_id >>= 7
    return _NODE_ID + bytes(groups) + bytes([node_id])
