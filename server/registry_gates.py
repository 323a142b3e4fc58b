"""Gates: what a version must pass before an alias moves to it.

A gate compares a candidate with what the alias points to now.  These look at what the signed
manifests state, and cost nothing; `MeasuredGate` measures anew, as a version is served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..peft_adapters.manifest import Provenance
from ..peft_adapters.signed_adapter import Verified
from .registry_rows import Version

_SAME_ROWS = 1e-3
"""Relative difference of the base's own loss up to which two runs measured on the same rows."""


@dataclass(frozen=True)
class Checked:
    """A version, and what its verification has just found."""

    version: Version
    verified: Verified

    @property
    def provenance(self) -> Provenance:
        return self.verified.provenance


@dataclass(frozen=True)
class Verdict:
    """`reasons` speak to the operator; a gate that refuses gives one or more."""

    passed: bool
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


class Gate(Protocol):
    """May take minutes; nothing is locked meanwhile."""

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        """`current` is None where the alias is new, or what it points to no longer verifies."""
        ...


@dataclass(frozen=True)
class LossGate:
    """Held-out loss, as the manifests state it, must not get worse by more than `max_increase`.

    Only losses over the same rows are compared: tests of one name, or run losses over rows of one
    digest, or, where a manifest states none, whose base had the same loss.  What was never
    measured, or on no common rows, is refused.  Nor may a candidate be worse than its own base.
    With `dtype`, a loss that was measured in another precision does not count.
    """

    max_increase: float = 0.0
    dtype: str = ""

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        pairs = _bounds(candidate.provenance, None if current is None else current.provenance)
        reasons = [
            f"loss {loss:.4f} on {name} is more than {bound:.4f} + {self.max_increase:g}"
            for name, (loss, bound) in pairs.items()
            if not loss <= bound + self.max_increase
        ]
        measured = candidate.provenance.dtype
        if self.dtype and measured not in ("", self.dtype):
            reasons.append(f"its loss was measured in {measured}, it is served in {self.dtype}")
        if not _losses(candidate.provenance):
            reasons.append("its manifest states no held-out loss")
        elif current is not None and not any(name.endswith(_NOW) for name in pairs):
            reasons.append(f"it and {current.version} were not measured on the same rows")
        figures = {name: loss for name, (loss, _) in pairs.items()}
        return Verdict(not reasons, tuple(reasons), figures)


@dataclass(frozen=True)
class LineageGate:
    """A candidate must be for the same base, and newer: by its run's rounds, and by its number.

    With `descends`, it must have been trained from the current version, or go on with its run.
    """

    descends: bool = False

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        if current is None or candidate.version.id == current.version.id:
            return Verdict(True)
        new, old = candidate.provenance, current.provenance
        same_run = new.run_id == old.run_id
        reasons = []
        if new.base_digest != old.base_digest:
            reasons.append(f"it is for another base than {current.version}")
        if same_run and new.rounds <= old.rounds:
            reasons.append(f"it has {new.rounds} rounds of a run, {current.version} {old.rounds}")
        elif not same_run and candidate.version.number < current.version.number:
            reasons.append(f"it is older than {current.version}: that is a rollback")
        if self.descends and not same_run and current.version.id not in new.parents:
            reasons.append(f"it was not trained from {current.version}")
        return Verdict(not reasons, tuple(reasons))


@dataclass(frozen=True)
class AllOf:
    """Passes what all of its gates pass; says what each has to say."""

    gates: Sequence[Gate]

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        verdicts = [gate.check(candidate, current) for gate in self.gates]
        figures = {name: value for one in verdicts for name, value in one.figures.items()}
        reasons = tuple(reason for verdict in verdicts for reason in verdict.reasons)
        return Verdict(all(verdict.passed for verdict in verdicts), reasons, figures)


_HELD_OUT = "the run's held-out rows"
_NOW = " (against the current version)"


def _bounds(new: Provenance, old: Provenance | None) -> dict[str, tuple[float, float]]:
    """(the candidate's loss, what it is held against) by the name of what was measured."""
    found = {}
    if new.loss is not None and new.base_loss is not None:
        found[f"{_HELD_OUT} (against the base)"] = new.loss, new.base_loss
    if old is not None:
        own, others = _losses(new), _losses(old)
        for name in sorted(own.keys() & others.keys()):
            if name != _HELD_OUT or _same_rows(new, old):
                found[name + _NOW] = own[name], others[name]
    return found


def _losses(provenance: Provenance) -> dict[str, float]:
    tests = {f"test {name!r}": loss for name, loss in provenance.evaluations.items()}
    return tests if provenance.loss is None else {_HELD_OUT: provenance.loss, **tests}


def _same_rows(new: Provenance, old: Provenance) -> bool:
    if new.base_digest != old.base_digest:
        return False
    if new.held_out_digest and old.held_out_digest:
        return (new.held_out_digest, new.dtype) == (old.held_out_digest, old.dtype)
    if new.base_loss is None or old.base_loss is None:
        return False
    return math.isclose(new.base_loss, old.base_loss, rel_tol=_SAME_ROWS)
