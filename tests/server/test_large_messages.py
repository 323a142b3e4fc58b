"""Payloads larger than any one request, through Flower's own forms of both apps' messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from meadow.client.app import _app
from meadow.fleet_routes import LARGEST_BODY
from meadow.server.app import _unwrap, wrap
from meadow.simulation import flower_identity

LARGE = bytes(range(256)) * (5 * 2**12) + bytes(9 * 2**20) + b"end"
"""14 MiB; some of its pieces are equal."""


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    flower_identity.assume()
    yield


def travelled(message: Message) -> Message:
    """As Flower sends it: taken apart into objects, each small enough, and put together again."""
    flower_identity.name_message(message.metadata, message.object_id)
    contents = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    assert max(map(len, contents.values())) < LARGEST_BODY / 3
    found = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(found, Message)
    flower_identity.name_message(found.metadata, message.metadata.message_id)
    return found


@pytest.mark.parametrize("payload", [LARGE, LARGE[:1000], b""], ids=len)
def test_a_payload_comes_whole_both_ways(payload: bytes) -> None:
    app = _app(lambda context, verb, body: body[::-1])
    message = travelled(Message(wrap(payload), dst_node_id=1, message_type="train"))
    reply = travelled(app(message, Context(1, 1, {}, RecordDict(), {})))
    assert _unwrap(reply) == payload[::-1]


def test_a_reply_of_other_records_carries_no_payload() -> None:
    message = travelled(Message(wrap(b"x"), dst_node_id=1, message_type="train"))
    content = RecordDict({"meadow/1": ConfigRecord({"payload": b"x"})})
    assert _unwrap(Message(content, reply_to=message)) == "the reply carries no payload"
