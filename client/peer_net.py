"""gRPC as peers use it: one service, whose methods are verbs, raw bytes both ways.

Import gRPC from here.
"""

from __future__ import annotations

import os

# Read when gRPC is first imported.  It would tell a peer's user of every stranger's failed
# handshake; what matters to a caller comes back as an error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc as grpc  # noqa: E402

from .peer_limits import PeerLimits  # noqa: E402

SERVICE = "/meadow.Peer/"
RETRY_AFTER = "retry-after-ms"
"""Metadata of a refusal: when to come back."""
LONGEST_CALL = 60.0
"""Seconds: a call without a deadline, or with a later one, is refused."""

_LONGEST_TEXT = 200  # characters


def size_options(limits: PeerLimits) -> list[tuple[str, int]]:
    """gRPC's options that bound one message."""
    return [
        ("grpc.max_send_message_length", limits.message),
        ("grpc.max_receive_message_length", limits.message),
    ]


def one_line(text: str) -> str:
    """Text of or for another peer: printable, on one line, not long."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return kept if len(kept) <= _LONGEST_TEXT else kept[: _LONGEST_TEXT - 3] + "..."
