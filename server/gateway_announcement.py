"""What a participant announces has to be its own answer to a question that was put to it.

A SuperLink compares who asks with the node that a request names, and not with the message inside
(Flower 1.41, superlink/servicer/fleet/fleet_handlers.py, push_messages).  A message that answers
nothing it takes for a question of the server app's, keeps it, and puts it to whatever node it
names.  Only that nodes have random numbers would stand between one participant and another's work.

The request is protobuf (flwr/proto/fleet.proto and message.proto): PushMessagesRequest
{messages_list = 2: Message}, Message {metadata = 1: Metadata}, Metadata {src_node_id = 3: uint64,
reply_to_message_id = 5: string}.
"""

from __future__ import annotations

from ..protobuf_fields import Value, only
from .gateway_refusal import Refusal

_MESSAGES, _METADATA, _SOURCE, _QUESTION = 2, 1, 3, 5


def require_own_answer(body: bytes, node_id: int) -> None:
    """Raise Refusal unless a request announces one message, which is this node's answer."""
    try:
        metadata = _nested(only(_nested(only(body, _MESSAGES)), _METADATA))
        source, question = only(metadata, _SOURCE), only(metadata, _QUESTION)
    except ValueError as error:
        raise Refusal(400, "what is announced is not one message") from error
    if source != node_id:
        raise Refusal(403, "a participant announces what is its own, in nobody else's name")
    if not isinstance(question, bytes) or not question:
        raise Refusal(403, "a participant announces answers, and this is none")


def _nested(value: Value | None) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a nested message is missing")
    return value
