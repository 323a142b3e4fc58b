"""What `meadow bench` was asked for: which benchmark, of which cases, and where its tables go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .kept_results import KeptResults
from .provenance import provenance

Row = dict[str, Any]
Phase = Callable[[str], None]
"""Told of each part of the work."""
Report = tuple[dict[str, Any], str]
"""A benchmark's figures, and the page that is made of them."""


def _silent(phase: str) -> None:
    pass


@dataclass(frozen=True)
class BenchRequest:
    """A benchmark by name, with the options that all benchmarks share."""

    name: str
    out: Path
    phase: Phase = _silent
    model: str = ""
    seeds: int = 0
    """0: the benchmark's own number."""
    only: str = ""
    """Comma-separated cases; empty: all."""
    reuse: tuple[str, ...] = ()
    """Other commits whose results in `out` count too."""

    def wanted(self, known: Sequence[str]) -> list[str]:
        """The cases to measure.  Raises ConfigError for an unknown one."""
        named = [part.strip() for part in self.only.split(",") if part.strip()]
        for case in named:
            if case not in known:
                hint = f"known: {', '.join(known)}"
                raise ConfigError(f"bench {self.name} has no case {case!r}", hint)
        return [case for case in known if case in named] if named else list(known)

    def refuse_model(self) -> None:
        """For a benchmark whose cases name their own models.  Raises ConfigError."""
        if self.model:
            raise ConfigError(f"bench {self.name} names its own models", "leave --model out")

    def at_once(self) -> None:
        """For a benchmark that measures all of it in one go.

        Raises ConfigError where results are to be reused, and OSError where the folder cannot be
        written: before the measuring.
        """
        if self.reuse:
            raise ConfigError(f"bench {self.name} keeps no results", "leave --reuse out")
        self.out.mkdir(parents=True, exist_ok=True)

    def kept(self) -> KeptResults:
        """For a benchmark of hours: the results that it keeps in its folder, as it goes.

        Raises OSError where the folder cannot be written: before the hours of measuring.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        origin = {key: provenance()[key] for key in ("hardware", "commit")}
        return KeptResults(self.out / "measured.jsonl", origin, self.reuse)

    def publish(
        self,
        rows: list[Row],
        page: Callable[[dict[str, Any]], str],
        reused: Sequence[str] = (),
    ) -> Report:
        """Write the report, `<name>.json`, and the page that is made of it, `<name>.md`.

        `reused` are the other commits that have measured some of it.
        """
        report = {"bench": self.name, **provenance(), "rows": rows}
        report["commit"] += "".join(f" and {commit}" for commit in reused)
        text = page(report)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.json").write_text(
            json.dumps(report, indent=1) + "\n", encoding="utf-8"
        )
        (self.out / f"{self.name}.md").write_text(text, encoding="utf-8")
        return report, text
