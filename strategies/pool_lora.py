"""pool_lora: the integers of a pool of directions, trained by backpropagation or without.

    first order   AdamW on the core C = 2^-unit Q between the pool's fixed sign matrices; what the
                  core gained, rounded to the grid, is sent
    zeroth order  as FedKSeed: a byte a step, for clients without memory for gradients
    coordinator   Q += sum_c w_c dQ_c,   w_c = n_c / n, times `zeroth_gain` for a zeroth-order c

Both kinds of clients enter the same integers; n counts the rows of all of them.  A zeroth-order
client moves Q little for its weight, so it holds the others back by its share; with
`first_share = "first_order"` a first-order client's n counts first-order clients' rows alone, and
zeroth-order changes are added to their mean.  With a shared core and r = 64 a first-order update
is 4,096 integers, the smallest that trains every layer (like LoRA-XS, Balazy et al. 2024,
arXiv 2405.17604, with signs for its frozen factors and one core).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UpdateError
from ..peft_adapters.bank import core_stack, core_tree
from ..peft_adapters.layout import CORE
from ..peft_adapters.pool import LARGEST, fold, refuse_overflow
from .averaging import notes_of
from .base import Sgd, State, Turn, Update, Work, option
from .pool_strategy import PoolStrategy, of_client, rounded, times
from .robust_bytes import fixed_weights
from .zeroth_order import next_scale


@dataclass(frozen=True, kw_only=True)
class PoolLora(PoolStrategy):
    name: ClassVar[str] = "pool_lora"
    paper: ClassVar[str] = "arXiv 2405.17604"
    summary: ClassVar[str] = "a core between fixed signs, by gradients or by zeroth-order bytes"

    zeroth: list[str] = option([], "participants that send zeroth-order bytes, by name")
    zeroth_gain: float = option(1.0, "factor of what zeroth-order clients change", 0)
    first_share: Literal["all", "first_order"] = option(
        "all", "a first-order client's weight is its share of the rows of these clients"
    )
    core_scale: int = option(
        -8, "exponent: a trained number of 1 is a core entry of 2^core_scale", -40, 40
    )

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        if turn.client in self.zeroth:
            return self.bytes_template(turn)
        return {CORE: tuple(sent.tensors["q"].shape)}

    def validate(self, update: Update, turn: Turn) -> None:
        super().validate(update, turn)
        core = update.tensors.get(CORE)
        if core is not None and core.dtype != torch.int32:
            raise UpdateError(f"{update.sender}: a core's change travels as int32")

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        if turn.client in self.zeroth:
            return (yield from self.zeroth_order(received, memory, turn))
        pool, scale = self.pool(turn.seed), 2.0**self.core_scale
        unit = 2.0**-pool.unit / scale  # of what is trained, for 1 of Q
        start = (received.tensors["q"].double() * unit).float()
        done = memory.data.get("steps", 0)
        trained = yield Sgd(
            core_tree(pool, start),
            turn.steps,
            first_step=done,
            total_steps=turn.total_steps,
            train=(CORE,),
            pool=pool,
            scale=scale,
        )
        gained = core_stack(pool, trained.adapter).double() - start.double()
        update = Update(
            {CORE: on_grid(gained / unit)}, float(trained.examples), notes=notes_of(trained)
        )
        return update, State(data={"steps": done + turn.steps})

    def step(self, state: State, total: Update, turn: Turn) -> State:
        sent, bytes_ = self.broadcast(state, turn), []
        q, scale = state.tensors["q"], state.data["scale"]
        change = torch.zeros_like(q)
        for part, weight in zip(total.parts, self.weights(total.parts), strict=True):
            if CORE in part.tensors:
                change += times(part.tensors[CORE].long(), weight)
            else:
                gain = round(self.zeroth_gain * weight)
                change += times(self.walked(part, sent, turn), gain)
                bytes_.append(part.tensors["bytes"])
        q = q + rounded(change)
        refuse_overflow(q)
        if self.adaptive_scale and bytes_:
            scale = next_scale(sent.notes["scale"], torch.cat(bytes_).long().numpy())
        return State({**state.tensors, "q": q}, {**state.data, "scale": scale})

    def weights(self, parts: Sequence[Update]) -> list[int]:
        """Each part's weight, in fixed point."""
        of_all: list[int] = fixed_weights([part.weight for part in parts]).tolist()
        first = [at for at, part in enumerate(parts) if CORE in part.tensors]
        if self.first_share == "first_order" and first:
            of_first = fixed_weights([parts[at].weight for at in first]).tolist()
            for at, weight in zip(first, of_first, strict=True):
                of_all[at] = weight
        return of_all

    def walked(self, part: Update, sent: Update, turn: Turn) -> Tensor:
        """What a zeroth-order client's bytes add to Q, by its own account: int64 (cores, r, r)."""
        row = part.tensors["bytes"].long()
        change = torch.zeros_like(sent.tensors["q"], dtype=torch.int64)
        k = self.along(sent, of_client(turn, part.sender), 0, len(row))
        fold(change, k, (-row * sent.notes["multiplier"]).numpy())
        return change


def on_grid(change: Tensor) -> Tensor:
    """The nearest integers, int32.  Raises UpdateError for a change that has outgrown them."""
    rounded = change.round()
    if not bool((rounded.abs() <= LARGEST).all()):  # NaN too
        raise UpdateError(
            "the core's change has outgrown 32 bits",
            "a smaller [clients] lr or [strategy] unit, or fewer steps",
        )
    return rounded.int()
