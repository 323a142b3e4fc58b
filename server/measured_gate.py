"""A gate that measures: held-out loss and canary prompts, in the precision of serving.

The base is loaded as it is served, in a process of its own, whose memory ends with it; here only
its figures and answers arrive.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import precision
from ..errors import ConfigError, ModelError
from .canaries import read_canaries
from .registry import Registry
from .registry_gates import Checked, Verdict

Question = Mapping[str, Any]
"""JSON: a `Serving`'s fields, `base_digest`, `held_out` and `canaries` (paths or ""), and
`versions`: the id and folder of each."""
Answers = Mapping[str, Any]
"""JSON: `rows`, `base_loss`, and for each version its `loss` and its `answers` to the canaries."""

HELD_OUT = "the held-out rows, as it is served"
_MEASURE = "meadow.simulation.measure_versions"


@dataclass(frozen=True)
class Serving:
    """How a base is loaded where its adapters are served."""

    base: str
    dtype: str = "float32"
    quantize: str = "none"
    device: str = "auto"
    max_length: int = 256  # tokens of a held-out row

    @property
    def precision(self) -> str:
        return precision(self.dtype, self.quantize)


def in_own_process(question: Question) -> Answers:
    """Ask `simulation.measure_versions`.  Raises ModelError with its last words where it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", _MEASURE],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ModelError(last)
    answers: Answers = json.loads(done.stdout)
    return answers


def require_rows(held_out: str) -> None:
    """Raise ConfigError where there is no such file or folder."""
    if not Path(held_out).exists():
        raise ConfigError(f"{held_out}: no such file of held-out rows")


class MeasuredGate:
    """Held-out loss must not get worse than the current version's by more than `max_increase`, nor
    than the base's; every canary must pass.

    What cannot be measured is refused.  Raises ConfigError, when it is made, for canaries that
    cannot be read and rows that are not there.
    """

    def __init__(
        self,
        registry: Registry,
        serving: Serving,
        held_out: str = "",
        canaries: str = "",
        max_increase: float = 0.0,
        measure: Callable[[Question], Answers] | None = None,
    ) -> None:
        if held_out:
            require_rows(held_out)
        self._registry, self._serving = registry, serving
        self._measure = measure or in_own_process
        self._held_out, self._file, self._max_increase = held_out, canaries, max_increase
        self._canaries = read_canaries(Path(canaries)) if canaries else []

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        with ExitStack() as leases:
            asked = [candidate, *([current] if current is not None and self._held_out else [])]
            opened = [leases.enter_context(self._registry.lease(one.version)) for one in asked]
            question = {
                **asdict(self._serving),
                "base_digest": candidate.provenance.base_digest,
                "held_out": self._held_out,
                "canaries": self._file,
                "versions": [{"id": one.version.id, "folder": str(one.folder)} for one in opened],
            }
            try:
                found = self._measure(question)
            except ModelError as error:
                return Verdict(False, (f"it could not be measured: {error}",))
        return self._judged(found, current)

    def _judged(self, found: Answers, current: Checked | None) -> Verdict:
        mine, *others = found["versions"]
        reasons, figures = [], {}
        if self._held_out:
            bounds = {"the base": found["base_loss"]}
            if current is not None:
                bounds[str(current.version)] = others[0]["loss"]
            figures = {HELD_OUT: mine["loss"], **{f"{HELD_OUT}: {n}": b for n, b in bounds.items()}}
            reasons += [
                f"loss {mine['loss']:.4f} on {HELD_OUT} ({self._serving.precision}), is more than"
                f" {bound:.4f} + {self._max_increase:g} of {name}"
                for name, bound in bounds.items()
                if not mine["loss"] <= bound + self._max_increase
            ]
        for canary, answer in zip(self._canaries, mine["answers"], strict=True):
            reasons += canary.faults(answer)
        return Verdict(not reasons, tuple(reasons), figures)
