"""One peer's steps: from the Q that the gossip has come to, to a record of signed bytes.

The learning helpers of a coordinator (momentum, schedules, adaptive scales) would need an order
that peers do not have: here a byte moves Q by its shift, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..config import Config
from ..identity import Identity
from ..peft_adapters.pool import Integers, directions
from ..strategies.base import Loss, Measured, Probe, Probed
from ..strategies.charter import Charter
from ..strategies.peer_keys import peer_of
from ..strategies.records import Head, Quantisation, Record
from ..strategies.zeroth_order import Header, Walked, walk
from .peer_terms import refuse_other_base, refuse_other_terms, shift_for, unscaled
from .task import Participant, answer
from .trainer import Trainer
from .workbench import Workbench

_QUANTISATION = {
    "none": Quantisation.NONE,
    "8bit": Quantisation.EIGHT_BIT,
    "4bit": Quantisation.FOUR_BIT,
}


@dataclass(frozen=True)
class Made:
    """A record that was made and not yet sent, and what its steps were like."""

    record: Record
    walked: Walked


class Stepper:
    """Makes records for one peer over its own text."""

    def __init__(
        self,
        config: Config,
        charter: Charter,
        identity: Identity,
        bench: Workbench,
        person: Participant,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Raises ConfigError or ModelError, before any work, where config, base or adapted layers
        are not the charter's."""
        refuse_other_terms(config, charter)
        refuse_other_base(charter, bench)
        self.config, self.charter, self.identity = unscaled(config, charter), charter, identity
        self.person, self.trainer = person, Trainer(bench.bank, config.clients, bench.pad, progress)
        self.peer = peer_of(identity)

    def make(self, q: Tensor, head: Head, members: int) -> Made:
        """The next record of this peer's chain, measured from Q on."""
        shift = shift_for(self.config.peer.lr, self.charter, members)
        walked = self.walk(q, head.steps, self.config.peer.steps, shift)
        quantisation = _QUANTISATION[self.config.model.quantize]
        sent = walked.bytes.numpy().astype(np.int8).tobytes()
        record = Record.sign(self.identity, self.charter.run, head, sent, shift, quantisation)
        return Made(record, walked)

    def walk(self, q: Tensor, first_step: int, steps: int, shift: int) -> Walked:
        """Local steps: the same for the same Q, place, text and machine."""
        charter = self.charter
        header = Header(charter.epsilon_exponent, charter.gradient_exponent, 1 << shift)
        run, size = charter.pool.run_id, charter.pool.size

        def along(step: int) -> Integers:
            return directions(run, self.peer, step, 1, size)

        work = walk(charter.pool, q, header, self.peer, first_step, along, steps)
        try:
            request: Probe = next(work)
            while True:
                found = answer(request, self.person, self.trainer)
                assert isinstance(found, Probed)
                request = work.send(found)
        except StopIteration as stop:
            walked: Walked = stop.value
            return walked

    def measure(self, q: Tensor) -> Measured:
        """The loss of the model that Q stands for, on this peer's held-out rows."""
        adapter = self.charter.pool.adapter(q, self.trainer.bank.scaling)
        return self.trainer.loss(Loss(adapter), self.person.held_out)
