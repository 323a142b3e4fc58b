"""What a participant may announce, beside how Flower's SuperLink would read the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
from announcements import SUPERLINK, announcement, metadata
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message
from gateways import Person, Site
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.gateway_client import GatewayClient
from meadow.fleet_routes import PUSH_MESSAGES
from meadow.server.gateway_announcement import require_own_answer
from meadow.server.gateway_refusal import Refusal

pytest_plugins = ("attack_fixtures",)

MINE, THEIRS = 2**63 + 5, 4711


def merged(*parts: Any) -> bytes:
    """One message whose metadata comes in parts: protobuf merges them, the last wins."""
    inner = b"".join(Message(metadata=part).SerializeToString() for part in parts)
    assert len(inner) < 2**14
    return b"\x12" + bytes([len(inner) & 0x7F | 0x80, len(inner) >> 7]) + inner


GOOD = announcement(MINE, metadata(MINE))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(announcement(MINE, metadata(SUPERLINK, "")), 403, id="as-the-superlink"),
        pytest.param(announcement(MINE, metadata(MINE, "")), 403, id="no-answer"),
        pytest.param(announcement(MINE, metadata(THEIRS)), 403, id="in-anothers-name"),
        pytest.param(announcement(MINE, metadata(0)), 403, id="in-nobodys-name"),
        pytest.param(
            announcement(MINE, metadata(MINE), metadata(THEIRS)), 400, id="one-behind-another"
        ),
        pytest.param(GOOD + announcement(MINE, metadata(SUPERLINK, "")), 400, id="two-requests"),
        pytest.param(merged(metadata(MINE), metadata(THEIRS)), 400, id="merged"),
        pytest.param(announcement(MINE), 400, id="nothing"),
        pytest.param(b"", 400, id="empty"),
        pytest.param(b"an answer", 400, id="junk"),
        pytest.param(GOOD[:-1], 400, id="cut"),
    ],
)
def test_only_ones_own_answer_is_announced(body: bytes, status: int) -> None:
    require_own_answer(GOOD, MINE)
    with pytest.raises(Refusal) as refused:
        require_own_answer(body, MINE)
    assert refused.value.status == status


@given(st.data())
def test_whatever_passes_the_superlink_reads_as_the_same(data: st.DataObject) -> None:
    at, cut = data.draw(st.integers(0, len(GOOD))), data.draw(st.integers(0, 6))
    changed = GOOD[:at] + data.draw(st.binary(max_size=12)) + GOOD[at + cut :]
    try:
        require_own_answer(changed, MINE)
        (read,) = PushMessagesRequest.FromString(changed).messages_list
    except (Refusal, DecodeError):
        return
    assert read.metadata.src_node_id == MINE and read.metadata.reply_to_message_id


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("source", [SUPERLINK, THEIRS])
def test_a_question_of_ones_own_never_reaches_the_superlink(
    place: Site, mallory: Person, client: GatewayClient, source: int
) -> None:
    """It would be put to whatever node it names, as if the server app had asked."""
    own = place.roster.by_name("mallory")
    assert own is not None
    forged = metadata(source, "" if source == SUPERLINK else "ab" * 32)
    body = announcement(own.node_id, forged)
    answer = client.signed("POST", PUSH_MESSAGES, body, mallory.headers(client))
    assert answer.status == 403


def test_an_answer_of_ones_own_goes_through(
    place: Site, mallory: Person, client: GatewayClient
) -> None:
    own = place.roster.by_name("mallory")
    assert own is not None
    body = announcement(own.node_id, metadata(own.node_id))
    answer = client.signed("POST", PUSH_MESSAGES, body, mallory.headers(client))
    assert answer.status == 200 and place.superlink.seen[-1].body == body
