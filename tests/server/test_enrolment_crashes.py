"""A coordinator that stops at any step of its disk forgets no decision and makes none twice.

An operator invites, a participant enrols, is approved, gets a certificate, changes its key and is
suspended, each as often as it takes to hear the answer.  Every primitive step of the disk is
numbered; the coordinator is ended at each number in each way that tests/helpers/faulty_disk.py
knows, and started again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from crashes import interrupt, steps
from cryptography import x509
from enrolment import DAY, NOON, Clock, new_flower_key, new_identity
from faulty_disk import Faulty, Numbered

from meadow.certificate_request import request_certificate
from meadow.server.authority import Authority
from meadow.server.roster import Participant, Roster
from meadow.store import Disk

OLD, NEW, FLOWER_KEY = new_identity(), new_identity(), new_flower_key()
OLD_KEY, NEW_KEY = OLD.public.public_bytes_raw(), NEW.public.public_bytes_raw()


@dataclass
class World:
    """What outlives every crash: what the operator and the participant have seen."""

    token: bytes = b""
    authority: bytes = b""
    certificate: bytes = b""
    seen: list[str] = field(default_factory=list)  # decisions that were confirmed


def coordinate(root: Path, disk: Disk, world: World) -> None:
    """The commands that are given again and again until each has ended well."""
    authority = Authority.open(root / "home" / "authority", disk, Clock())
    assert world.authority in (b"", authority.certificate)
    world.authority = authority.certificate
    pair = authority.issue_server(["meadow.example.org"])
    assert authority.issue_server(["meadow.example.org"]) == pair
    with Roster.open(root / "home" / "roster.db", disk, Clock()) as roster:
        for decide in (_invite, _enrol, _approve, _certify, _rotate, _suspend):
            if decide.__name__ not in world.seen:
                decide(roster, authority, world)
                world.seen.append(decide.__name__)


def _invite(roster: Roster, _: Authority, world: World) -> None:
    world.token = roster.invite("a", DAY)


def _enrol(roster: Roster, _: Authority, world: World) -> None:
    roster.enrol(world.token, OLD_KEY, FLOWER_KEY)


def _approve(roster: Roster, _: Authority, world: World) -> None:
    roster.approve("a", 7)


def _certify(roster: Roster, authority: Authority, world: World) -> None:
    world.certificate = authority.issue_client("a", request_certificate(OLD))
    roster.certified(OLD_KEY, NOON + 30 * DAY)


def _rotate(roster: Roster, _: Authority, world: World) -> None:
    roster.rotate(OLD_KEY, NEW_KEY)


def _suspend(roster: Roster, _: Authority, world: World) -> None:
    roster.suspend("a")


def finish(root: Path, world: World) -> None:
    """Start again after the fault, and check that nothing shows."""
    coordinate(root, Numbered(root), world)
    with Roster.open(root / "home" / "roster.db", Numbered(root), Clock()) as roster:
        expected = Participant("a", NEW_KEY, "suspended", FLOWER_KEY, 7, NOON, 0, 0)
        assert roster.participants() == [expected]
        assert roster.by_key(OLD_KEY) is None
        kinds = [note.kind for note in roster.notes()]
    # an invitation whose answer was lost is made once more; nothing else is
    assert kinds[-5:] == ["invited", "enrolled", "approved", "rotated", "suspended"]
    assert kinds[:-5] in ([], ["invited"])
    authority = x509.load_pem_x509_certificate(world.authority)
    x509.load_pem_x509_certificate(world.certificate).verify_directly_issued_by(authority)


@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_any_step(tmp_path: Path, roots: Iterator[Path], way: str) -> None:
    places = steps(partial(coordinate, world=World()), tmp_path / "count", way)
    assert len(places) >= 10
    for at, root in zip(places, roots, strict=False):
        world = World()
        finish(interrupt(partial(coordinate, world=world), Faulty(root, at, way)), world)


class ForgetsUses(Roster):
    """What must not be: the token is used up before who used it is written down."""

    def enrol(self, token: bytes, key: bytes, flower_key: str) -> Participant:
        self._transaction(lambda: self._db.execute("UPDATE participants SET token = NULL"))
        return super().enrol(token, key, flower_key)


def test_a_roster_that_forgets_would_be_noticed(
    tmp_path: Path, roots: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof has teeth."""
    monkeypatch.setattr(f"{__name__}.Roster", ForgetsUses)
    root = next(iter(roots))
    with pytest.raises(Exception, match="unknown"):
        coordinate(root, Numbered(root), World())
