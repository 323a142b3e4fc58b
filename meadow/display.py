"""What a person sees while a run goes on: rounds, losses of each participant, bytes, time left.

A terminal gets a live panel, anything else one line a round.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .events import Event


def bytes_text(count: float) -> str:
    """A size with its unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def late_text(data: Mapping[str, Any]) -> str:
    """What becomes of an answer that came late, from its event's data."""
    fate = f"counts in round {data['counts_in']}" if "counts_in" in data else "is left out"
    return f"{data['client']} answered too late and {fate}"


def seconds_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Display:
    """An event observer and progress meter; use it as a context manager."""

    def __init__(self, console: Console, steps: int = 0) -> None:
        self.console, self.steps = console, steps
        self.done, self.phase, self.round, self.rounds = 0, "", 0, 0
        self.bytes_up, self.losses, self.trained = 0, {"": 0.0}, {}  # type: ignore[var-annotated]
        self.history: list[tuple[int, Mapping[str, Any]]] = []
        self.messages: list[str] = []
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
            for message in self.messages:  # the panel is gone; what it said is not
                self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def enter(self, phase: str) -> None:
        """A new part of the work begins."""
        self.phase = phase
        if not self.console.is_terminal:
            self.console.print(f"{phase} ...", markup=False, soft_wrap=True)

    def advance(self, steps: int) -> None:
        """So many client-steps have been made."""
        if not self.done:
            self._began = time.monotonic()  # loading says nothing of the speed of training
        self.done += steps

    def left(self) -> float | None:
        """Seconds left, from the mean speed so far."""
        if not self.done or not self.steps:
            return None
        return max(0.0, (time.monotonic() - self._began) * (self.steps - self.done) / self.done)

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.kind == "round_opened":
            self.round, self.rounds, self.trained = event.round, data["rounds"], {}
        elif event.kind == "contribution":
            self.trained[data["client"]] = data.get("loss")
            self.bytes_up += data["bytes"]
        elif event.kind == "refused":
            self._say(f"round {event.round}: refused {data['client']}: {data['reason']}")
        elif event.kind == "late":
            self._say(f"round {event.round}: {late_text(data)}")
        elif event.kind == "notice":
            self._say(data["text"])
        elif event.kind == "published":
            at = f"; {data['alias']} points to it" if data["alias"] else ""
            self._say(f"published {data['version']}{at}")
        elif event.kind == "run_started":
            cut = {name: rows for name, rows in data.get("truncated", {}).items() if rows}
            if cut:
                self._say(
                    "rows longer than max_length, cut: "
                    + ", ".join(f"{n} {c}" for n, c in cut.items())
                )
        elif event.kind == "round_closed":
            self._closed(event)

    def _say(self, text: str) -> None:
        self.messages.append(text)
        if not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _closed(self, event: Event) -> None:
        self.history.append((event.round, event.data))
        if self.console.is_terminal:
            return
        loss = f"held-out loss {event.data['loss']:.4f}, " if "loss" in event.data else ""
        left = self.left()
        rest = "" if left is None else f", about {seconds_text(left)} left"
        text = f"round {event.round}/{self.rounds}: {loss}{bytes_text(self.bytes_up)} sent{rest}"
        self.console.print(text, highlight=False)

    def _render(self) -> RenderableType:
        left = self.left()
        head = f"[bold]{escape(self.phase)}[/]"
        if self.rounds:
            head += f"  round {self.round}/{self.rounds}  {bytes_text(self.bytes_up)} sent"
        if left is not None:
            head += f"  about {seconds_text(left)} left"
        parts: list[RenderableType] = [Text.from_markup(head), *map(Text, self.messages[-3:])]
        if self.history or self.trained:
            parts.append(self._table())
        return Group(*parts)

    def _table(self) -> Table:
        """Held-out loss of each participant, the last rounds side by side."""
        shown = self.history[-8:]
        table = Table(box=None, pad_edge=False)
        table.add_column("held-out loss")
        for number, _ in shown:
            table.add_column(f"r{number}", justify="right")
        table.add_column("training now", justify="right")
        names = sorted(
            {*self.trained, *(name for _, row in shown for name in row.get("losses", {}))}
        )
        for name in names:
            cells = [_loss(row.get("losses", {}).get(name)) for _, row in shown]
            table.add_row(name, *cells, _loss(self.trained.get(name)))
        table.add_row(
            "[bold]everyone", *[f"[bold]{_loss(row.get('loss'))}" for _, row in shown], ""
        )
        return table


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
