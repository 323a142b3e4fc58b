"""A SuperNode that was killed is signed off before its successor signs on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from gateways import Person, Quick, Site, home, options_of, site
from hypothesis import given
from hypothesis.strategies import integers

from meadow.client.departure import departure
from meadow.client.uplink import Uplink
from meadow.fleet_routes import ACTIVATE, DEACTIVATE, HEARTBEAT


@given(integers(1, 2**64 - 1))
def test_it_is_what_flower_would_send(node: int) -> None:
    assert departure(node) == DeactivateNodeRequest(node_id=node).SerializeToString()


def uplink_of(place: Site, folder: Path, name: str, node: str) -> tuple[Uplink, Person]:
    person = place.participant(name)
    person.membership = replace(person.membership, node_id=node)
    mine = home(folder / name, person)
    return Uplink(mine, options_of(mine).identity, person.flower, Quick()), person


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_second_supernode_takes_the_place_of_the_first(tmp_path: Path, status: int) -> None:
    """Whether or not the SuperLink still took the first for present."""
    with site(tmp_path) as place:
        place.superlink.answers[DEACTIVATE] = (status, b"")
        uplink, person = uplink_of(place, tmp_path, "ada", str(2**64 - 1))
        with uplink, person.client() as client:
            headers = person.headers(client)
            assert uplink.fleet(ACTIVATE, headers, b"hello").status == 200
            assert uplink.fleet(HEARTBEAT, headers, b"here").status == 200
        seen = [(seen.path, seen.body) for seen in place.superlink.seen]
        farewell = (DEACTIVATE, departure(2**64 - 1))
        assert seen == [farewell, (ACTIVATE, b"hello"), (HEARTBEAT, b"here")]


def test_who_has_no_node_yet_has_nobody_to_sign_off(tmp_path: Path) -> None:
    with site(tmp_path) as place:
        uplink, person = uplink_of(place, tmp_path, "bob", "")
        with uplink, person.client() as client:
            uplink.fleet(ACTIVATE, person.headers(client), b"hello")
        assert [seen.path for seen in place.superlink.seen] == [ACTIVATE]
