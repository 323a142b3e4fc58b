"""Another identity key: at several coordinators, and cut short at every step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faulty_disk import Crash, Faulty, Numbered
from gateways import Person, Site, home, site

from meadow.client.gateway_client import GatewayClient
from meadow.client.key_rotation import next_path, rotate_identity
from meadow.client.membership import Membership
from meadow.errors import GatewayError
from meadow.identity import Identity


def works(folder: Path, identity: Path, person: Person) -> bool:
    with GatewayClient(Membership.load(folder), Identity.load_or_create(identity)) as client:
        return person.ask(client).status == 200


def test_a_rotation_that_is_cut_short_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        steps = _steps(place, tmp_path)
        assert steps > 8
        for at in range(1, steps + 1):
            for way in ("before", "after"):
                _cut_short(place, tmp_path / f"{way}{at}", at, way)


def _steps(place: Site, tmp_path: Path) -> int:
    person = place.participant("counting")
    folder = home(tmp_path / "counting" / "user" / "home", person)
    disk = Numbered(tmp_path / "counting")
    rotate_identity(folder.parent / "home-identity.pem", [folder], disk)
    assert works(folder, folder.parent / "home-identity.pem", person)
    return disk.count


def _cut_short(place: Site, root: Path, at: int, way: str) -> None:
    person = place.participant(root.name)
    folder = home(root / "user" / "home", person)
    identity = root / "user" / "home-identity.pem"
    with pytest.raises(Crash):
        rotate_identity(identity, [folder], Faulty(root, at, way))
    shutil.rmtree(root.with_name(root.name + "+"))
    new = rotate_identity(identity, [folder])
    assert Identity.load_or_create(identity).key_id == new.key_id
    assert new.key_id != person.identity.key_id and not next_path(identity).exists()
    assert works(folder, identity, person)
    known = place.roster.by_name(root.name)
    assert known is not None and known.key == new.public.public_bytes_raw()


def joined(place: Site, person: Person) -> Person:
    """The same participant at another coordinator."""
    other = Person(Membership.of(place.invite("anna at two")), person.identity, person.flower)
    with other.client() as client:
        client.enrol(other.flower.public_pem)
        place.roster.approve("anna at two", 7)
        found = client.enrol(other.flower.public_pem)
    other.membership = other.membership.with_certificate(found.certificate)
    return other


def test_all_coordinators_know_the_new_key_in_the_end(tmp_path: Path) -> None:
    with site(tmp_path / "one") as one, site(tmp_path / "two") as two:
        person = one.participant("anna")
        other = joined(two, person)
        folders = [home(tmp_path / "anna" / "home", person), home(tmp_path / "anna" / "two", other)]
        identity = tmp_path / "anna" / "home-identity.pem"
        two.stop()
        with pytest.raises(GatewayError, match="cannot be reached"):
            rotate_identity(identity, folders)
        two.move(two.address)
        rotate_identity(identity, folders)
        assert works(folders[0], identity, person) and works(folders[1], identity, other)


def test_a_coordinator_that_is_gone_does_not_cut_its_participant_off_from_the_others(
    tmp_path: Path,
) -> None:
    """A run that is over has no coordinator any more; who has not left it is told to."""
    with site(tmp_path / "one") as one, site(tmp_path / "two") as two:
        person = one.participant("anna")
        there = home(tmp_path / "anna" / "home", person)
        gone = home(tmp_path / "anna" / "two", joined(two, person))
        identity = tmp_path / "anna" / "home-identity.pem"
        two.stop()
        with pytest.raises(GatewayError, match=f"cannot be reached.*client leave --folder {gone}"):
            rotate_identity(identity, [there, gone])
        assert works(there, identity, person)
        new = rotate_identity(identity, [there])
        assert works(there, identity, person) and new.key_id != person.identity.key_id
        two.move(two.address)
