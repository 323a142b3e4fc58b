"""What the strategies share whose state is the integers of a pool of directions.

The state is Q (see `peft_adapters.pool`); the whole of it is broadcast each round, so that one
message catches up any absence.  The round's header (scale, multiplier) travels in its notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ClientsConfig
from ..errors import ConfigError, UpdateError
from ..peft_adapters.layout import Tree
from ..peft_adapters.pool import LARGEST, Cores, Integers, Pool, directions, refuse_overflow
from .base import Loss, Reducer, State, Strategy, Turn, Update, Work, option
from .robust_bytes import FRACTION
from .zeroth_order import (
    MOST,
    Header,
    multiplier_of,
    notes_of_walk,
    run_id_of,
    walk,
    within_grid,
)


@dataclass(frozen=True, kw_only=True)
class PoolStrategy(Strategy):
    """Options and halves of zeroth-order steps over a pool."""

    secure_sum: ClassVar[bool] = False
    integers: ClassVar[bool] = True
    customary_rank: ClassVar[int | None] = 64  # FedKSeed's 4,096 directions
    dp: ClassVar[str] = "open"

    lr: float = option(1e-4, "weight change for a projected gradient of 1", 1e-12)
    epsilon: int = option(-10, "exponent: the loss is measured at +-2^epsilon", -40, 10)
    scale: int = option(-3, "exponent, round 1: a byte of 1 is a gradient of 2^scale", -40, 40)
    adaptive_scale: bool = option(True, "the coordinator lets scale follow the bytes' size")
    directions: int = option(1, "directions measured in one batch (divides [clients] batch)", 1)
    cores: Cores = option("shared", "one core for all matrices, or per_layer")
    unit: int = option(30, "one integer of the state moves weights by 2^-unit", 0, 48)

    def pool(self, seed: int) -> Pool:
        """The directions of a run with this seed."""
        sites = tuple(sorted(self.sites, key=lambda site: site.name))
        digest = self.base_digest or 64 * "0"
        return Pool(run_id_of(seed), digest, sites, self.rank, self.cores, self.unit)

    def check(self) -> None:
        multiplier_of(self.lr / self.directions, self.scale, self.unit)

    def check_clients(self, clients: ClientsConfig) -> None:
        if clients.batch % self.directions:
            raise ConfigError(
                f"[clients] batch = {clients.batch} cannot be dealt evenly to"
                f" {self.directions} directions",
                "a divisor of the batch",
            )
        if clients.clip_update or clients.wire != "float32":
            raise ConfigError(
                f"{self.name} sends integers, which are neither clipped nor rounded",
                'clip_update = 0 and wire = "float32"',
            )

    def init(self, seed: int) -> State:
        return State({"q": self.pool(seed).zero()}, {"scale": self.scale, "seed": seed})

    def rate(self, turn: Turn) -> float:
        """The learning rate of a round."""
        return self.lr

    def broadcast(self, state: State, turn: Turn) -> Update:
        q, rate = state.tensors["q"], self.rate(turn) / self.directions
        refuse_overflow(q)
        scale = within_grid(state.data["scale"], rate, self.unit)
        multiplier = multiplier_of(rate, scale, self.unit)
        return Update({"q": q.int()}, notes={"scale": scale, "multiplier": multiplier})

    def export(self, state: State) -> Tree:
        return self.pool(state.data["seed"]).adapter(state.tensors["q"], self.scaling)

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        return Loss(self.pool(turn.seed).adapter(received.tensors["q"].long(), self.scaling))

    def along(self, sent: Update, turn: Turn, first: int, count: int) -> Integers:
        """The directions of a client's measurements `first` to `first + count` of this round."""
        start = (turn.round - 1) * turn.steps * self.directions + first
        run = run_id_of(turn.seed)
        return directions(run, turn.client.encode(), start, count, self.rank * self.rank)

    def zeroth_order(self, received: Update, memory: State, turn: Turn) -> Work:
        """A client's half: local steps, of which the bytes are sent."""
        done = memory.data.get("steps", 0)
        header = Header(self.epsilon, received.notes["scale"], received.notes["multiplier"])

        def along(step: int) -> Integers:
            return self.along(received, turn, (step - done) * self.directions, self.directions)

        q = received.tensors["q"].long()
        who = turn.client.encode()
        walked = yield from walk(self.pool(turn.seed), q, header, who, done, along, turn.steps)
        notes = notes_of_walk(walked)
        update = Update({"bytes": walked.bytes}, float(walked.examples), notes=notes)
        return update, State(data={"steps": done + turn.steps})

    def bytes_template(self, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {"bytes": (turn.steps * self.directions,)}

    def validate(self, update: Update, turn: Turn) -> None:
        sent = update.tensors.get("bytes")
        if sent is not None and (sent.dtype != torch.int8 or int(sent.min()) < -MOST):
            raise UpdateError(f"{update.sender}: a byte is out of range (-{MOST} to {MOST})")

    def reducer(self, turn: Turn) -> Reducer:
        return Gather()

    def report(self, total: Update, turn: Turn) -> dict[str, float]:
        found = [part.tensors["bytes"] for part in total.parts if "bytes" in part.tensors]
        if not found:
            return {}
        bytes_ = torch.cat(found).int()
        return {
            "saturated": int((bytes_.abs() == MOST).sum()),
            "silent": int((bytes_ == 0).sum()),
            "steps": bytes_.numel(),
        }


class Gather(Reducer):
    """No combination: the strategy sees every update, which here is a few hundred bytes each."""

    def __init__(self) -> None:
        self._parts: list[Update] = []

    def fold(self, update: Update) -> None:
        self._parts.append(update)

    def total(self) -> Update:
        weight = sum(part.weight for part in self._parts)
        return Update({}, weight, len(self._parts), parts=tuple(self._parts))


_HALF = 1 << FRACTION >> 1


def times(change: Tensor, factor: int, bits: int = 0) -> Tensor:
    """A change of Q, or a part of it, times a factor that makes it fixed point; of the factor
    itself, `bits` lie behind the point (at most 10).

    Raises UpdateError for one that Q could not hold, long before int64 could wrap.
    """
    if int(change.abs().max()) * factor > LARGEST << FRACTION + bits:
        raise UpdateError(
            "what the clients send would move the pool's state out of 32 bits",
            "a smaller [strategy] lr or unit",
        )
    return change * factor >> bits


def rounded(change: Tensor) -> Tensor:
    """Fixed point to the nearest integers."""
    return (change + _HALF) >> FRACTION


def of_client(turn: Turn, client: str) -> Turn:
    """The turn of one client of a round."""
    return replace(turn, client=client)
