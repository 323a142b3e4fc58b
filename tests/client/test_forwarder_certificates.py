"""A participant's certificate is renewed in time, and a renewal overwrites nothing newer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import RUN, Person, Quick, Site, home, options_of, site

from meadow.client.gateway_client import Enrolment, GatewayClient
from meadow.client.key_rotation import rotate_identity
from meadow.client.membership import Membership
from meadow.client.uplink import Uplink
from meadow.errors import GatewayError
from meadow.identity import Identity

DAY = 86400.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


def uplink_of(person: Person, folder: Path, clock: Any = time.time) -> Uplink:
    options = options_of(folder)
    return Uplink(folder, options.identity, person.flower, Quick(), clock)


def test_a_certificate_is_renewed_in_the_last_third_of_its_life(
    place: Site, tmp_path: Path
) -> None:
    person = place.participant("renewing")
    folder = home(tmp_path / "home", person)
    begins, ends = person.membership.lifetime()
    with uplink_of(person, folder) as uplink:
        client = uplink.client()
        client.now()
        due = begins + (ends - begins) * 2 / 3
        client._ahead = due - 60 - client._clock()
        assert not uplink.renew_if_due()
        client._ahead = due + 60 - client._clock()
        assert uplink.renew_if_due()
        renewed = Membership.load(folder)
        assert renewed.certificate != person.membership.certificate
        assert renewed == person.membership.with_certificate(renewed.certificate)
        assert uplink.client() is not client, "the new certificate is taken up"
        assert uplink.fleet(RUN, {}, b"question").status == 200
        assert not uplink.renew_if_due()


def test_a_renewal_overwrites_nothing_that_was_written_meanwhile(
    place: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is under way while the user follows a coordinator that moves, and then gets
    another key: the certificate of the old one comes too late."""
    person = place.participant("writing")
    folder = home(tmp_path / "home", person)
    identity = options_of(folder).identity
    addresses = ("127.0.0.1:1", place.address)
    renew = GatewayClient.renew

    def moves(client: GatewayClient) -> Enrolment:
        found = renew(client)
        Membership.change(folder, Quick(), lambda now: replace(now, addresses=addresses))
        return found

    def rotates(client: GatewayClient) -> Enrolment:
        found = renew(client)
        rotate_identity(identity, [folder], Quick())
        return found

    with uplink_of(person, folder) as uplink:
        _, ends = person.membership.lifetime()
        for meanwhile, kept in ((moves, True), (rotates, False)):
            client = uplink.client()
            client.now()
            client._ahead = ends - 60 - client._clock()
            monkeypatch.setattr(GatewayClient, "renew", meanwhile)
            assert uplink.renew_if_due() == kept
            assert Membership.load(folder).addresses == addresses
            assert uplink.fleet(RUN, {}, b"question").status == 200


def test_an_expired_certificate_is_replaced_by_the_invitations_token(
    place: Site, tmp_path: Path
) -> None:
    person = place.participant("away")
    folder = home(tmp_path / "home", person)
    with uplink_of(person, folder, lambda: time.time() + 40 * DAY) as uplink:
        assert uplink.renew_if_due()
    assert Membership.load(folder).certificate != person.membership.certificate
    place.roster.suspend("away")
    with uplink_of(person, folder, lambda: time.time() + 40 * DAY) as uplink:
        with pytest.raises(GatewayError, match="suspended"):
            uplink.renew_if_due()


def test_a_new_identity_is_taken_up(place: Site, tmp_path: Path) -> None:
    person = place.participant("changing")
    folder = home(tmp_path / "home", person)
    new = Identity(Ed25519PrivateKey.generate())
    with uplink_of(person, folder) as uplink:
        found = uplink.client().rotate(new)
        successor = Person(
            person.membership.with_certificate(found.certificate), new, person.flower
        )
        other = home(tmp_path / "new", successor)
        for name in (folder.name + "-identity.pem",):
            os.replace(other.parent / "new-identity.pem", folder.parent / name)
        os.replace(other / "membership.json", folder / "membership.json")
        assert uplink.fleet(RUN, {}, b"question").status == 200


def test_a_closed_uplink_opens_nothing(place: Site, tmp_path: Path) -> None:
    """A thread may begin its work only when the forwarder is already ending."""
    person = place.participant("late")
    uplink = uplink_of(person, home(tmp_path / "home", person))
    uplink.close()
    with pytest.raises(GatewayError, match="ending"):
        uplink.renew_if_due()
