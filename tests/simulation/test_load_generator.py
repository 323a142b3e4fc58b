"""The load generator's participants through a real gateway, before a SuperLink that is played."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from gateways import Site, site

from meadow.errors import GatewayError, MeadowError
from meadow.fleet_routes import FLEET
from meadow.message_pieces import joined
from meadow.server.app import wrap
from meadow.simulation import flower_identity, load_generator
from meadow.simulation.load_generator import FleetParticipant, LoadGenerator

NODE, RUN = 77, 5
PAYLOAD = bytes(range(200)) * 30_000  # two pieces


class PlayedSuperLink(dict[str, tuple[int, bytes]]):
    """Answers of a `FakeSuperLink` that depend on the question; holds one message for the node."""

    def __init__(self, place: Site) -> None:
        super().__init__()
        flower_identity.assume(run_id=RUN)
        self._seen, self.pushed = place.superlink.seen, dict[str, bytes]()
        self.refuse = 0  # so many questions, as a SuperLink does that is busy
        self.message = Message(wrap(PAYLOAD), dst_node_id=NODE, message_type="train")
        flower_identity.name_message(self.message.metadata, self.message.object_id)
        parts = get_all_nested_objects(self.message)
        self.objects = {name: part.deflate() for name, part in parts.items()}
        told = message_to_proto(remove_content_from_message(self.message))
        trees = [get_object_tree(self.message)]
        answer = PullMessagesResponse(messages_list=[told], message_object_trees=trees)
        place.superlink.messages.append(answer.SerializeToString())
        place.superlink.answers = self

    def get(self, path: str, default: Any = None) -> Any:
        if self.refuse:
            self.refuse -= 1
            return 503, b""
        return 200, self._answer(path.removeprefix(FLEET), self._seen[-1].body)

    def _answer(self, route: str, body: bytes) -> Any:
        if route == "pull-object":
            name = PullObjectRequest.FromString(body).object_id
            return PullObjectResponse(
                object_found=True, object_available=True, object_content=self.objects[name]
            ).SerializeToString()
        if route == "push-messages":
            (tree,) = PushMessagesRequest.FromString(body).message_object_trees
            names = [tree.object_id, *(c.object_id for t in tree.children for c in t.children)]
            names += [child.object_id for child in tree.children]
            wanted = PushMessagesResponse(objects_to_push=names, session_id="s")
            return wanted.SerializeToString()
        if route == "push-object":
            push = PushObjectRequest.FromString(body)
            self.pushed[push.object_id] = push.object_content
            return PushObjectResponse(stored=push.session_id == "s").SerializeToString()
        return b""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path, largest=2**24) as found:
        yield found


@pytest.fixture
def person(place: Site) -> Iterator[FleetParticipant]:
    with FleetParticipant(place.invite("anna")) as found:
        assert place.roster.by_name("anna").status == "pending"  # type: ignore[union-attr]
        place.roster.approve("anna", NODE)
        yield found


def test_a_participant_takes_a_message_and_answers_it(place: Site, person: Any) -> None:
    superlink = PlayedSuperLink(place)
    person.activate()
    message = person.fetch(*person.pull())
    assert joined(message.content.config_records) == PAYLOAD
    person.reply(message, PAYLOAD[::-1])
    described = next(s for s in place.superlink.seen if s.path == FLEET + "push-messages")
    told = PushMessagesRequest.FromString(described.body).messages_list[0].metadata
    assert told.reply_to_message_id == superlink.message.metadata.message_id
    assert (told.run_id, told.src_node_id) == (RUN, NODE)
    answer = inflate_object_from_contents(told.message_id, superlink.pushed)
    assert isinstance(answer, Message)
    assert joined(answer.content.config_records) == PAYLOAD[::-1]


def test_it_activates_and_confirms_as_a_supernode_does(place: Site, person: Any) -> None:
    superlink = PlayedSuperLink(place)
    person.activate()
    person.fetch(*person.pull())
    bodies = {seen.path.removeprefix(FLEET): seen.body for seen in place.superlink.seen}
    activated = ActivateNodeRequest.FromString(bodies["activate-node"])
    enrolled = place.roster.by_name("anna")
    assert enrolled is not None and activated.public_key.decode() == enrolled.flower_key
    confirmed = ConfirmMessageReceivedRequest.FromString(bodies["confirm-message-received"])
    assert confirmed.message_object_id == superlink.message.metadata.message_id
    assert confirmed.node.node_id == NODE


def test_a_busy_superlink_is_asked_again(
    place: Site, person: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    superlink = PlayedSuperLink(place)
    monkeypatch.setattr(load_generator, "_PAUSE", 0.01)
    superlink.refuse = 3
    person.activate()
    assert superlink.refuse == 0
    monkeypatch.setattr(load_generator, "_TRIES", 2)
    superlink.refuse = 2
    with pytest.raises(GatewayError) as raised:
        person.heartbeat()
    assert raised.value.status == 503


class Scripted:
    """A participant that pulls what it is given: a message, nothing, or an error."""

    def __init__(self, *pulls: Any) -> None:
        self._pulls, self.replies = list(pulls), list[bytes]()
        self.done = threading.Event()

    def activate(self) -> None: ...

    def close(self) -> None: ...

    def pull(self) -> Any:
        if not self._pulls:
            self.done.set()
            threading.Event().wait(0.01)
            return None
        found = self._pulls.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def fetch(self, message: Message, tree: object) -> Message:
        return message

    def reply(self, message: Message, payload: bytes) -> None:
        self.replies.append(payload)


def asked() -> tuple[Message, None]:
    flower_identity.assume()
    return Message(wrap(b""), dst_node_id=1, message_type="evaluate"), None


def test_all_answer_and_go_on_while_the_gateway_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_generator, "_PAUSE", 0.01)
    away = GatewayError("away")
    people = [Scripted(asked(), None, away, asked()), Scripted(away, asked())]
    with LoadGenerator(people, at_once=1) as generator:  # type: ignore[arg-type]
        thread = threading.Thread(target=generator.run)
        thread.start()
        assert all(person.done.wait(30) for person in people)
        generator.stop()
        thread.join(30)
    assert [len(person.replies) for person in people] == [2, 1] and not generator.fault


def test_a_refusal_ends_all_with_its_reason() -> None:
    refused = Scripted(GatewayError("anna is revoked", status=403))
    with (
        LoadGenerator([refused, Scripted()], at_once=1) as generator,  # type: ignore[list-item]
        pytest.raises(MeadowError, match="GatewayError: anna is revoked"),
    ):
        generator.run()
