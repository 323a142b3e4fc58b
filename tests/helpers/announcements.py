"""What a SuperNode announces to a SuperLink, made with Flower's own protobuf."""

from __future__ import annotations

from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

SUPERLINK = 1
"""Flower's name for itself."""


def metadata(source: int, question: str = "ab" * 32) -> Any:
    return Metadata(
        run_id=3, message_id="cd" * 32, src_node_id=source, dst_node_id=SUPERLINK, ttl=60.0,
        reply_to_message_id=question, message_type="train", created_at=1.8e9,
    )  # fmt: skip


def announcement(node: int, *told: Any) -> bytes:
    """The request of a node, with the metadata of each message in it."""
    made: bytes = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[Message(metadata=one) for one in told],
        message_object_trees=[ObjectTree(object_id="cd" * 32)],
        clientapp_runtime_list=[0.5],
    ).SerializeToString()
    return made
