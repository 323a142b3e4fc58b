"""What of Flower's HTTP interface a participant may use, and what goes with it.

Of all that a SuperLink offers, a SuperNode needs these twelve routes (Flower 1.41,
superlink/routers/fleet).  Gateway and forwarder let through nothing else: the control and runtime
routes at the same port would let anybody submit code to every participant.
"""

from __future__ import annotations

from datetime import UTC, datetime

FLEET = "/v1/fleet/"
ACTIVATE = FLEET + "activate-node"
DEACTIVATE = FLEET + "deactivate-node"
PULL_MESSAGES = FLEET + "pull-messages"
PUSH_MESSAGES = FLEET + "push-messages"
CONFIRM = FLEET + "confirm-message-received"
GET_FAB = FLEET + "get-fab"
HEARTBEAT = FLEET + "send-node-heartbeat"

FLEET_ROUTES = frozenset(
    FLEET + name
    for name in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)

PUBLIC_KEY = "flwr-public-key"
TIMESTAMP = "flwr-timestamp"
SIGNATURE = "flwr-signature"
"""A SuperNode's own authentication: base64 of its public key (PEM), and an ECDSA signature over
the text of a time stamp alone."""

REQUEST_HEADERS = (
    PUBLIC_KEY,
    TIMESTAMP,
    SIGNATURE,
    "content-type",
    "accept",
    "flwr-package-name",
    "flwr-package-version",
    "flwr-component-name",
)
"""All that a SuperLink needs to see of a request's headers."""

ANSWER_HEADERS = ("content-type", "flwr-version-incompatibility-message")
"""All that a SuperNode needs to see of an answer's headers; where it redirects to is not."""

REFUSAL = "Meadow-Refusal"
"""Marks an answer that gateway or forwarder gave by itself, not the SuperLink."""

LARGEST_BODY = 16 * 2**20
"""Bytes; Flower sends objects in pieces of 5 MiB."""


def timestamp(seconds: float) -> str:
    """Unix seconds as Flower writes the time that it signs."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()
