"""DiLoCo: many inner AdamW steps, their optimiser's state kept by the client, and outer steps.

    Delta = mean_i(theta - theta_i)
    average    theta -= Delta
    sgd        theta -= lr Delta
    nesterov   v = mu v + Delta;  theta -= lr (Delta + mu v)

Douillard et al. 2023 (arXiv 2311.08105); lr by the number of clients M from Charles et al. 2025,
"Communication-Efficient Language Model Training Scales Reliably" (arXiv 2503.09799), table of
best outer rates: 0.4, 0.6, 0.6, 0.8 for M = 1, 2, 4, 8.  With few rounds Nesterov's momentum has
no time to pay (measured: ten rounds of it are worse than no communication), so `outer = "auto"`
averages in runs shorter than `long_run` rounds, and ramps mu linearly over `ramp` rounds in others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import ConfigError
from ..peft_adapters.layout import FACTORS, Tree
from .averaging import fresh_adapter, notes_of, put, select, under
from .base import Loss, Sgd, State, Turn, Update, Work, option
from .staleness import Patient

_OUTER_RATES = ((1, 0.4), (4, 0.6), (8, 0.8))  # (up to M clients, lr)


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Patient):
    name: ClassVar[str] = "diloco"
    paper: ClassVar[str] = "arXiv 2311.08105"
    summary: ClassVar[str] = (
        "inner AdamW state stays with the client; outer average, SGD or Nesterov"
    )
    sends_changes: ClassVar[bool] = True

    outer: Literal["auto", "average", "sgd", "nesterov"] = option(
        "auto", "auto, average, sgd or nesterov"
    )
    outer_lr: float = option(0.0, "0: by the number of clients (scaling-law table)", 0)
    outer_momentum: float = option(0.9, "nesterov's mu", 0)
    ramp: int = option(10, "rounds over which mu rises from 0", 0)
    long_run: int = option(50, "auto: from so many rounds on, nesterov", 1)
    freeze_a: bool = option(False, "train and send B only")

    def check(self) -> None:
        if not 0 <= self.outer_momentum < 1:
            raise ConfigError("diloco's outer_momentum must be at least 0 and below 1")

    @property
    def moving(self) -> tuple[str, ...]:
        return ("lora_B",) if self.freeze_a else FACTORS

    def rule(self, turn: Turn) -> str:
        if self.outer != "auto":
            return self.outer
        return "nesterov" if turn.rounds >= self.long_run else "average"

    def init(self, seed: int) -> State:
        return State(put("x", fresh_adapter(self.sites, self.rank, seed)))

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update(under("x", state.tensors))

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in select(sent.tensors, self.moving).items()}

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        done = memory.data.get("steps", 0)
        trained = yield Sgd(
            received.tensors,
            turn.steps,
            done,
            turn.total_steps,
            train=self.moving,
            optimizer=under("inner", memory.tensors) or None,
        )
        delta = {
            n: received.tensors[n] - t for n, t in select(trained.adapter, self.moving).items()
        }
        # A joiner's inner optimiser is cold: its first round warms it up and counts for nothing.
        weight = 0.0 if 1 < turn.joined == turn.round else 1.0
        update = Update(delta, weight=weight, notes={**notes_of(trained), "delta": True})
        return update, State(put("inner", trained.optimizer), {"steps": done + turn.steps})

    def step(self, state: State, total: Update, turn: Turn) -> State:
        x, v = under("x", state.tensors), under("v", state.tensors)
        rule = self.rule(turn)
        lr = 1.0 if rule == "average" else self.outer_lr or outer_rate(round(total.weight))
        mu = (
            self.outer_momentum * min(1.0, turn.round / max(1, self.ramp))
            if rule == "nesterov"
            else 0.0
        )
        for name, delta in total.tensors.items():
            momentum = mu * v[name] + delta if name in v else delta
            if rule == "nesterov":
                v[name] = momentum
            x[name] = x[name] - lr * (delta + mu * momentum)
        return State({**put("x", x), **put("v", v)})

    def export(self, state: State) -> Tree:
        return under("x", state.tensors)

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        return Loss(received.tensors)


def outer_rate(clients: int) -> float:
    """The scaling-law table's best outer learning rate for M clients."""
    for most, rate in _OUTER_RATES:
        if clients <= most:
            return rate
    return _OUTER_RATES[-1][1]
