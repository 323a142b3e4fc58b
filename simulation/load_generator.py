"""Many participants of a real coordinator in one process, which train nothing.

    python -m meadow.simulation.load_generator --invitations FILE --at-once 8

Each enrols with its invitation, keeps its SuperNode's place with heartbeats, pulls its messages,
whole, and answers with finite random numbers in the shapes of what it was sent.  Everything goes
through the gateway, signed, as a forwarder would send it.  Flower's messages and protobuf forms
are its own; of Flower's clients nothing runs here.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ..client.flower_key import FlowerKey
from ..client.gateway_client import GatewayClient, good
from ..client.membership import Membership
from ..closeable import Closeable
from ..errors import GatewayError, MeadowError
from ..fleet_routes import FLEET
from ..identity import Identity
from ..invitation import Invitation
from ..message_pieces import cut, joined
from ..strategies.base import Update
from ..strategies.messages import pack_update, unpack_update
from .flower_identity import name_message

HEARTBEAT_SECONDS = 30.0  # Flower's own
_PAUSE = 0.5
_BUSY, _TRIES = (429, 500, 502, 503, 504), 20  # a forwarder asks again, too
_LOST_SECONDS = 30.0  # without the gateway
_SMALL = 1e-3  # size of the random numbers
_HEADERS = {
    "content-type": "application/protobuf",
    "accept": "application/protobuf",
    "flwr-package-name": "flwr",
    "flwr-package-version": version("flwr"),
    "flwr-component-name": "SuperNode",
}

T = TypeVar("T")


class FleetParticipant(Closeable):
    """One enrolled participant that speaks Flower's fleet protocol through the gateway."""

    def __init__(self, invitation: Invitation) -> None:
        """Enrols.  Raises GatewayError."""
        self._identity = Identity(Ed25519PrivateKey.generate())
        self._flower = FlowerKey(generate_private_key(SECP384R1()))
        self._gateway = GatewayClient(Membership.of(invitation), self._identity)
        self._gateway.enrol(self._flower.public_pem)

    def close(self) -> None:
        self._gateway.close()

    def activate(self) -> None:
        """Wait for the operator's approval; then be online, as a SuperNode that has started."""
        while not (enrolment := self._gateway.enrol(self._flower.public_pem)).certificate:
            time.sleep(_PAUSE)
        membership = self._gateway.membership.with_certificate(enrolment.certificate)
        self._gateway.close()
        self._gateway = GatewayClient(membership, self._identity)
        self._node = Node(node_id=int(enrolment.node_id))
        key = self._flower.public_pem.encode()
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_SECONDS)
        self._ask("activate-node", request, ActivateNodeResponse)

    def heartbeat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        self._ask("send-node-heartbeat", request, SendNodeHeartbeatResponse)

    def pull(self) -> tuple[Message, ObjectTree] | None:
        """A message without its content, and where that is; the gateway holds the question."""
        request = PullMessagesRequest(node=self._node)
        answer = self._ask("pull-messages", request, PullMessagesResponse)
        if not answer.messages_list:
            return None
        return message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]

    def fetch(self, message: Message, tree: ObjectTree) -> Message:
        """The whole message, whose receipt is confirmed."""
        run = message.metadata.run_id
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            if part.object_id not in contents:
                contents[part.object_id] = self._object(run, part.object_id)
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=message.metadata.message_id
        )
        self._ask("confirm-message-received", request, ConfirmMessageReceivedResponse)
        whole = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(whole, Message)
        name_message(whole.metadata, message.metadata.message_id)
        return whole

    def reply(self, message: Message, payload: bytes) -> None:
        """Send an answer: its description, then every part of it that is missing there."""
        content = RecordDict(
            {name: ConfigRecord({**piece}) for name, piece in cut(payload).items()}
        )
        answer = Message(content, reply_to=message)
        with no_object_id_recompute():
            name_message(answer.metadata, answer.object_id)
            objects, tree = get_all_nested_objects(answer), get_object_tree(answer)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(answer))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        wanted = self._ask("push-messages", request, PushMessagesResponse)
        for name in wanted.objects_to_push:
            self._push(answer.metadata.run_id, wanted.session_id, name, objects[name].deflate())

    def _object(self, run: int, name: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
        while True:
            answer = self._ask("pull-object", request, PullObjectResponse)
            if answer.object_available:
                return answer.object_content
            if not answer.object_found:
                raise GatewayError(f"the SuperLink has no object {name}")
            time.sleep(_PAUSE)

    def _push(self, run: int, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run, object_id=name, object_content=content, session_id=session
        )
        if not self._ask("push-object", request, PushObjectResponse).stored:
            raise GatewayError(f"the SuperLink does not store object {name}")

    def _ask(self, route: str, request: Any, kind: type[T]) -> T:
        headers = {**_HEADERS, **self._flower.headers(self._gateway.now())}
        body = request.SerializeToString()
        for left in reversed(range(_TRIES)):
            try:
                answer = good(self._gateway.signed("POST", FLEET + route, body, headers))
                break
            except GatewayError as error:
                if error.status not in _BUSY or not left:
                    raise
                time.sleep(_PAUSE)
        found: T = kind.FromString(answer.body)  # type: ignore[attr-defined]
        return found


def answer_to(message: Message, seed: int) -> bytes:
    """A contribution, or a held-out loss, that a coordinator has no reason to refuse."""
    if message.metadata.message_type == "evaluate":
        return pack_update(Update({}, notes={"loss": 1.0, "tokens": 100}))
    sent, header = unpack_update(joined(message.content.config_records) or b"")
    generator = torch.Generator().manual_seed(seed + header["turn"]["round"])
    tensors = {
        name: _SMALL * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sent.tensors.items()
    }
    notes = {"loss": 1.0, "examples": 1, "tokens": 100}
    return pack_update(replace(sent, tensors=tensors, weight=1.0, notes=notes))


class LoadGenerator(Closeable):
    """All participants, each in a thread; only `at_once` of them carry a large message."""

    def __init__(self, participants: Sequence[FleetParticipant], at_once: int) -> None:
        self._participants, self._room = participants, threading.BoundedSemaphore(at_once)
        self._ended, self.fault = threading.Event(), ""
        self._online: list[FleetParticipant] = []

    def run(self) -> None:
        """Until `stop`; MeadowError where a participant could not go on."""
        self._begin(self._keep_alive)
        for seed, person in enumerate(self._participants):
            person.activate()
            self._online.append(person)
            self._begin(self._work, person, seed)
        self._ended.wait()
        if self.fault:
            raise MeadowError(self.fault)

    def stop(self) -> None:
        self._ended.set()

    def close(self) -> None:
        self.stop()
        for person in self._participants:
            person.close()

    def _begin(self, work: Any, *arguments: Any) -> None:
        """In a thread of its own."""
        threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True).start()

    def _guarded(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            if not self._ended.is_set():
                self.fault = f"{type(error).__name__}: {error}"
                self._ended.set()

    def _work(self, person: FleetParticipant, seed: int) -> None:
        lost = 0.0
        while not self._ended.is_set():
            try:
                pulled = person.pull()
                lost = 0.0
            except GatewayError as error:  # it ends when the run has
                lost = lost or time.monotonic()
                if error.status or time.monotonic() > lost + _LOST_SECONDS:
                    raise
                self._ended.wait(_PAUSE)
                continue
            if pulled is not None:
                with self._room:
                    message = person.fetch(*pulled)
                    person.reply(message, answer_to(message, 1000 * seed))

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS / 2):
            for person in list(self._online):
                try:
                    person.heartbeat()
                except GatewayError as error:
                    if error.status:
                        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """The process: until SIGTERM; with status 2, and one line, where it cannot go on."""
    parser = argparse.ArgumentParser(prog="meadow.simulation.load_generator")
    parser.add_argument("--invitations", type=Path, required=True, help="JSON: a list of texts")
    parser.add_argument("--at-once", type=int, default=8)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts = json.loads(chosen.invitations.read_text())
    try:
        with ExitStack() as stack:
            people = [
                stack.enter_context(FleetParticipant(Invitation.parse(text))) for text in texts
            ]
            generator = stack.enter_context(LoadGenerator(people, chosen.at_once))
            signal.signal(signal.SIGTERM, lambda *_: generator.stop())
            generator.run()
    except MeadowError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
