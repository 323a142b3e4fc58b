"""Whatever is done with a roster in whatever order: keys never return, names never fork."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from enrolment import DAY, Clock, new_flower_key, new_key
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from meadow.errors import MeadowError
from meadow.server.roster import Roster
from meadow.store import Disk

NAMES = st.sampled_from(["a", "b"])
KEYS = [new_key() for _ in range(5)]
FLOWER_KEYS = [new_flower_key() for _ in range(5)]
PLACES = st.integers(0, 4)


class Model(RuleBasedStateMachine):
    """Whatever is done in whatever order: keys never return, names never fork."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.roster = Roster.open(Path(":memory:"), MemoryDisk(), self.clock)
        self.tokens = [bytes(16)]
        self.dead: set[bytes] = set()

    def teardown(self) -> None:
        self.roster.close()

    def attempt(self, decide: Callable[[], object]) -> None:
        try:
            decide()
        except MeadowError:
            pass

    @rule(name=NAMES)
    def invite(self, name: str) -> None:
        self.attempt(lambda: self.tokens.append(self.roster.invite(name, DAY)))

    @rule(token=st.integers(0, 9), key=PLACES)
    def enrol(self, token: int, key: int) -> None:
        chosen = self.tokens[-1 - token % len(self.tokens)]
        self.attempt(lambda: self.roster.enrol(chosen, KEYS[key], FLOWER_KEYS[key]))

    @rule(name=NAMES, node=st.integers(1, 3))
    def approve(self, name: str, node: int) -> None:
        self.attempt(lambda: self.roster.approve(name, node))

    @rule(name=NAMES, what=st.sampled_from(["suspend", "resume"]))
    def decide(self, name: str, what: str) -> None:
        self.attempt(lambda: getattr(self.roster, what)(name))

    @rule(name=NAMES)
    def revoke(self, name: str) -> None:
        known = self.roster.by_name(name)
        self.attempt(lambda: self.roster.revoke(name))
        if known is not None and known.key:
            self.dead.add(known.key)

    @rule(old=PLACES, new=PLACES)
    def rotate(self, old: int, new: int) -> None:
        known = self.roster.by_key(KEYS[old])
        self.attempt(lambda: self.roster.rotate(KEYS[old], KEYS[new]))
        if known is not None and self.roster.by_key(KEYS[old]) is None:
            self.dead.add(KEYS[old])

    @rule(passed=st.sampled_from([1.0, DAY, -DAY]))
    def wait(self, passed: float) -> None:
        self.clock.now += passed

    @invariant()
    def dead_keys_are_of_no_use(self) -> None:
        for key in self.dead:
            found = self.roster.by_key(key)
            assert found is None or found.status == "revoked"

    @invariant()
    def nobody_is_half_enrolled(self) -> None:
        people = self.roster.participants()
        for one in people:
            assert bool(one.key) == bool(one.flower_key) == bool(one.enrolled)
            assert one.status in ("invited", "revoked") or one.key
            assert bool(one.node_id) >= (one.status in ("approved", "suspended"))
        keys = [one.key for one in people if one.key]
        assert len(set(keys)) == len(keys)

    @invariant()
    def the_notes_hold(self) -> None:
        self.roster.notes()


class MemoryDisk(Disk):
    """No files at all, for many short lives."""

    def folder(self, path: Path) -> None:
        return

    def connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None)


def test_whatever_is_done_in_whatever_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the lock beside ":memory:" is a file all the same
    run_state_machine_as_test(
        Model, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
