"""A member of a federation: does one turn's work and remembers it before it is sent.

Knows nothing of Flower or of the network: bytes in, bytes out.  A contribution is computed once;
asked again for the same round, a member repeats the identical bytes from its outbox.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import FormatError
from ..strategies.base import Answer, Loss, Measured, Request, State, Strategy, Turn, Update
from ..strategies.error_feedback import with_owed, without_owed
from ..strategies.messages import (
    pack_state,
    pack_update,
    turn_from_json,
    unpack_state,
    unpack_update,
)
from ..strategies.transforms import Transform, to_client
from .outbox import Outbox
from .task import drive


class Member:
    """One participant's side of a run.

    `respond` answers the strategy's requests.  With `rehearse`, work already in the outbox is done
    again before its bytes are repeated: a fused group trains in the same composition as before a
    crash, so that its other members' numbers do not change in the last bit.
    """

    def __init__(
        self,
        name: str,
        strategy: Strategy,
        outbox: Outbox,
        respond: Callable[[Request], Answer],
        transforms: Sequence[Transform] = (),
        rehearse: bool = False,
    ) -> None:
        self.name, self.strategy, self.outbox, self.respond = name, strategy, outbox, respond
        self.transforms, self.rehearse = transforms, rehearse

    def work(self, payload: bytes) -> bytes:
        """Train for one turn; the contribution's bytes."""
        received, header = unpack_update(payload)
        turn = turn_from_json(header.get("turn"))
        if turn.client != self.name:
            raise FormatError(f"{self.name} received a turn of {turn.client!r}")
        self.outbox.settle(turn.round)
        recorded = self.outbox.pending(turn.round)
        if recorded is not None and not self.rehearse:
            return recorded
        memory, owed = without_owed(self._memory(turn.round))
        update, after = drive(self.strategy.work(received, memory, turn), self.respond)
        if recorded is not None:
            return recorded
        update, owed = to_client(self.transforms, update, received, turn, owed)
        sent = pack_update(update)
        self.outbox.record(turn.round, sent, pack_state(with_owed(after, owed)))
        return sent

    def evaluate(self, payload: bytes) -> bytes:
        """Measure what this client would use now on its own held-out rows."""
        received, header = unpack_update(payload)
        turn = turn_from_json(header.get("turn"))
        measured = self.respond(self.own(received, turn))
        assert isinstance(measured, Measured)
        return pack_update(Update({}, notes={"loss": measured.loss, "tokens": measured.tokens}))

    def own(self, received: Update, turn: Turn) -> Loss:
        """What this client would use after round `turn.round`."""
        memory, _ = without_owed(self._memory(turn.round + 1))
        return self.strategy.own(received, memory, turn)

    def _memory(self, before_round: int) -> State:
        recorded = self.outbox.memory(before_round)
        return State() if recorded is None else unpack_state(recorded)
