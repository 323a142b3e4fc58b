"""What a participant keeps of its enrolment, and that no writer overwrites what another wrote."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_disk import Crash, Faulty

from meadow.client.membership import Membership
from meadow.errors import ConfigError, FormatError
from meadow.store import Disk

MINE = Membership("ada", ("a.example:1",), "", "00" * 16, "a certificate", "7", "ab")


def test_a_membership_is_kept_as_it_was(tmp_path: Path) -> None:
    MINE.save(tmp_path, Disk())
    assert Membership.load(tmp_path) == MINE
    assert (tmp_path / "membership.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "name": "a", "addresses": [], "authority": "", "token": ""}',
        '{"format": 1, "name": "a", "addresses": [7], "authority": "", "token": ""}',
        '{"format": 1, "name": 7, "addresses": ["a:1"], "authority": "", "token": ""}',
        '{"format": 1, "name": "a", "addresses": ["a:1"], "authority": "", "token": "", "x": ""}',
    ],
)
def test_a_membership_that_cannot_be_used_is_named(text: str) -> None:
    with pytest.raises(FormatError, match=r"membership\.json"):
        Membership.parse(text)


def test_without_a_membership_one_is_told_to_join(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="join"):
        Membership.load(tmp_path)


# --- writers -------------------------------------------------------------------------------------


def test_two_writers_take_turns(tmp_path: Path) -> None:
    """Neither reads before the other has written: what both changed is there in the end."""
    MINE.save(tmp_path, Disk())
    both_inside = threading.Barrier(2)
    met = []

    def writer(**fields: object) -> threading.Thread:
        def change(now: Membership) -> Membership:
            with contextlib.suppress(threading.BrokenBarrierError):
                met.append(both_inside.wait(0.5))
            return replace(now, **fields)  # type: ignore[arg-type]

        return threading.Thread(target=Membership.change, args=(tmp_path, Disk(), change))

    writers = writer(certificate="renewed"), writer(addresses=("b.example:2",))
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not met
    expected = replace(MINE, certificate="renewed", addresses=("b.example:2",))
    assert Membership.load(tmp_path) == expected


def test_a_change_begins_where_nothing_is_yet(tmp_path: Path) -> None:
    def add(text: str) -> Callable[[Membership], Membership]:
        return lambda now: replace(now, terms=now.terms + text)

    with pytest.raises(ConfigError, match="join"):
        Membership.change(tmp_path, Disk(), add("c"))
    assert Membership.change(tmp_path, Disk(), add("c"), MINE).terms == "abc"
    assert Membership.change(tmp_path, Disk(), add("d"), MINE).terms == "abcd"
    assert Membership.load(tmp_path).terms == "abcd"


def test_a_change_that_fails_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    root = tmp_path / "ada"
    root.mkdir()
    MINE.save(root, Disk())
    with pytest.raises(Crash):
        Membership.change(root, Faulty(root, 1, "before"), lambda now: replace(now, terms="cd"))
    assert Membership.load(root) == MINE
    assert Membership.change(root, Disk(), lambda now: replace(now, terms="cd")).terms == "cd"
