"""The Flower ClientApp: hands a message's bytes to this node's member and returns its answer.

One of the three files that import Flower.  A fault
that meadow names (text, model, a loss that is not finite) becomes an error reply with its reason
and never stops the other clients; anything else is a defect and shows itself.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from ..errors import MeadowError, StorageError
from .member import Member

_REFUSED = 100  # an error code outside Flower's own


def build(member_of: Callable[[int], Member]) -> ClientApp:
    """A ClientApp that serves the members that `member_of` finds by Flower's node id."""
    app = ClientApp()

    def reply(message: Message, context: Context, act: Callable[[Member, bytes], bytes]) -> Message:
        payload = message.content["meadow"]["payload"]
        try:
            answer = act(member_of(context.node_id), payload if isinstance(payload, bytes) else b"")
        except StorageError:
            raise  # this machine's disk, not this client's work
        except MeadowError as error:
            return Message(Error(code=_REFUSED, reason=str(error)), reply_to=message)
        return Message(RecordDict({"meadow": ConfigRecord({"payload": answer})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, context, lambda member, payload: member.work(payload))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return reply(message, context, lambda member, payload: member.evaluate(payload))

    @app.query()
    def name(message: Message, context: Context) -> Message:
        return reply(message, context, lambda member, payload: member.name.encode())

    return app
