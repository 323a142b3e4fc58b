"""The Flower ClientApp: hands a message's bytes to this node's member and returns its answer.

One of the three files that import Flower.  In one process (the local engine) members are objects;
in a deployment the member lives in the resident trainer, and this process, which Flower starts for
every message, imports no torch.  What meadow names as a fault (text, model, policy, a loss that is
not finite) becomes an error reply with its reason and never stops the other clients; anything else
is a defect and shows itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from ..errors import MeadowError, StorageError, TrainerError
from ..message_pieces import cut, joined
from .trainer_link import EVALUATE, TRAIN, TrainerLink

if TYPE_CHECKING:  # torch stays out of this process
    from .member import Member

Answer = Callable[[Context, str, bytes], bytes]
"""Flower's context, verb, payload -> the answer's payload."""

_REFUSED = 100  # an error code outside Flower's own


def build(member_of: Callable[[int], Member]) -> ClientApp:
    """A ClientApp that serves the members that `member_of` finds by Flower's node id."""

    def answer(context: Context, verb: str, payload: bytes) -> bytes:
        member = member_of(context.node_id)
        return member.work(payload) if verb == TRAIN else member.evaluate(payload)

    return _app(answer)


def ask_trainer(context: Context, verb: str, payload: bytes) -> bytes:
    """Answer through the trainer whose socket the node's configuration names.

    Raises TrainerError where it refuses, or where there is none.
    """
    socket = context.node_config.get("trainer")
    if not isinstance(socket, str):
        raise TrainerError("this node has no trainer", "`meadow client` starts node and trainer")
    with TrainerLink(Path(socket)) as link:
        return link.call(verb, payload)


def _app(answer: Answer) -> ClientApp:
    """The closed list of verbs: a message of any other kind finds no function."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(message, context, TRAIN, answer)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _reply(message, context, EVALUATE, answer)

    return app


def _reply(message: Message, context: Context, verb: str, answer: Answer) -> Message:
    try:
        data = answer(context, verb, joined(message.content.config_records) or b"")
    except StorageError:
        raise  # this machine's disk, not this client's work
    except MeadowError as error:
        return _dated(Message(Error(code=_REFUSED, reason=str(error)), reply_to=message), message)
    content = RecordDict({name: ConfigRecord({**piece}) for name, piece in cut(data).items()})
    return _dated(Message(content, reply_to=message), message)


def _dated(reply: Message, message: Message) -> Message:
    """The reply, valid as long as the message by the sender's clock; this machine's may be wrong,
    and a SuperLink refuses what seems to have expired or to outlive its question."""
    reply.metadata.created_at = message.metadata.created_at
    reply.metadata.ttl = message.metadata.ttl
    return reply


app = _app(ask_trainer)
"""What Flower loads in a deployment."""
