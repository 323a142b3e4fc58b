"""Whom the gateway takes for whom: signatures, keys and certificates that are not the sender's.

Nothing of what is refused may reach the SuperLink.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from attacks import Wire, said, signed, written
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import RUN, Person, Quick, Site

from meadow.certificate_request import request_certificate
from meadow.client.gateway_client import GatewayClient
from meadow.client.gateway_connection import client_tls
from meadow.fleet_routes import FLEET
from meadow.identity import Identity
from meadow.server.authority import Authority

pytest_plugins = ("attack_fixtures",)


# --- signatures --------------------------------------------------------------------------------


def test_a_request_byte_for_byte_again_counts_once(
    place: Site, mallory: Person, client: GatewayClient
) -> None:
    wire = Wire(place, mallory)
    request = written(RUN, signed(wire, client), b"question")
    assert wire.say(request)[0] == 200
    before = len(place.superlink.seen)
    assert wire.say(request)[0] == 401
    wire.close()
    again = Wire(place, mallory)
    assert again.say(request)[0] == 401
    again.close()
    assert len(place.superlink.seen) == before


@pytest.mark.usefixtures("unreached")
def test_a_request_does_not_count_in_another_session(
    place: Site, mallory: Person, wire: Wire, client: GatewayClient
) -> None:
    with mallory.client() as other:
        other.now()
        headers = {**signed(wire, client), "Meadow-Session": other.session}
        assert other.session != client.session
        assert wire.say(written(RUN, headers, b"question"))[0] == 401


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize(
    "change",
    [
        {"Meadow-Session": "00" * 16},
        {"Meadow-Session": ""},
        {"Meadow-Session": "../../.."},
        {"Meadow-Sequence": "999"},
        {"Meadow-Sequence": "0"},
        {"Meadow-Sequence": "-1"},
        {"Meadow-Sequence": "1e3"},
        {"Meadow-Sequence": "9" * 40},
        {"Meadow-Signature": base64.b64encode(bytes(64)).decode()},
        {"Meadow-Signature": ""},
        {"Meadow-Signature": "AAAA"},
    ],
)
def test_forged_signature_headers_are_refused(
    wire: Wire, client: GatewayClient, change: dict[str, str]
) -> None:
    headers = {**signed(wire, client), **change}
    status, body = wire.say(written(RUN, headers, b"question"))
    assert status == 401 and json.loads(body)["error"]


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("name", ["Meadow-Session", "Meadow-Sequence", "Meadow-Signature"])
def test_no_signature_header_may_be_missing(wire: Wire, client: GatewayClient, name: str) -> None:
    headers = {key: value for key, value in signed(wire, client).items() if key != name}
    assert wire.say(written(RUN, headers, b"question"))[0] == 401


@pytest.mark.usefixtures("unreached")
def test_what_was_signed_is_what_counts(wire: Wire, client: GatewayClient) -> None:
    other_body = signed(wire, client, body=b"another")
    assert wire.say(written(RUN, other_body, b"question"))[0] == 401


@pytest.mark.usefixtures("unreached")
def test_a_signature_for_another_path_does_not_hold(wire: Wire, client: GatewayClient) -> None:
    other_path = signed(wire, client, FLEET + "get-fab")
    assert wire.say(written(RUN, other_path, b"question"))[0] == 401


@pytest.mark.usefixtures("unreached")
def test_a_signature_for_another_server_does_not_hold(
    wire: Wire, client: GatewayClient, bob: Person
) -> None:
    """Somebody between, with a certificate of its own, cannot pass requests on."""
    wire.certificate = ssl.PEM_cert_to_DER_cert(bob.membership.certificate)
    assert wire.say(written(RUN, signed(wire, client), b"question"))[0] == 401


@pytest.mark.usefixtures("unreached")
def test_a_session_request_cannot_be_replayed(wire: Wire, place: Site, mallory: Person) -> None:
    body = json.dumps({"nonce": "ab" * 16}).encode()
    path = "/meadow/v1/session"
    with mallory.client() as client:
        headers = client._signer.opening("POST", path, body, wire.certificate)
    assert wire.say(written(path, headers, body))[0] == 200
    again = Wire(place, mallory)
    assert again.say(written(path, headers, body))[0] == 401
    again.close()


# --- identities --------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreached")
def test_another_participants_flower_key_is_refused(
    wire: Wire, client: GatewayClient, bob: Person
) -> None:
    stolen = bob.flower.headers(client.now())  # even with a signature of that key
    status, body = wire.say(written(RUN, {**signed(wire, client), **stolen}, b"question"))
    assert status == 403 and b"mallory" in body and b"bob" not in body


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("spelling", ["missing", "space", "folded", "padded", "pem"])
def test_the_flower_key_has_one_spelling(wire: Wire, client: GatewayClient, spelling: str) -> None:
    headers = signed(wire, client)
    own = headers.pop("flwr-public-key")
    changed = {
        "space": own[:10] + " " + own[10:],
        "folded": own[:10] + "\r\n " + own[10:],
        "padded": own + "=",
        "pem": base64.b64encode(base64.b64decode(own).replace(b"\n", b"\r\n")).decode(),
    }
    if spelling in changed:
        headers["flwr-public-key"] = changed[spelling]
    assert wire.say(written(RUN, headers, b"question"))[0] in (400, 403)


@pytest.mark.usefixtures("unreached")
def test_another_participants_session_is_unknown(
    wire: Wire, client: GatewayClient, bob: Person
) -> None:
    with bob.client() as theirs:
        theirs.now()
        client._signer.begin(theirs.session)
        status, body = wire.say(written(RUN, signed(wire, client), b"question"))
    assert status == 401 and json.loads(body)["error"] == "unknown session"


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("path", [RUN, "/meadow/v1/session", "/meadow/v1/renew"])
def test_nothing_goes_without_a_certificate(
    place: Site, mallory: Person, client: GatewayClient, path: str
) -> None:
    bare = Wire(place, replace(mallory, membership=mallory.membership.with_certificate("")))
    status, _ = bare.say(written(path, signed(bare, client, path), b"question"))
    bare.close()
    assert status == 403


@pytest.mark.usefixtures("unreached")
def test_a_certificate_of_another_authority_ends_the_connection(
    place: Site, mallory: Person, client: GatewayClient, tmp_path: Path
) -> None:
    """Even one that says the same about the same key."""
    other = Authority.open(tmp_path, Quick())
    forged = other.issue_client("mallory", request_certificate(mallory.identity)).decode()
    wire = Wire(place, replace(mallory, membership=mallory.membership.with_certificate(forged)))
    assert wire.say(written(RUN, signed(wire, client), b"question")) == (0, b"")
    wire.close()


@pytest.mark.usefixtures("unreached")
def test_a_certificate_for_a_stranger_lets_in_nowhere(place: Site, client: GatewayClient) -> None:
    """One of our authority, for a key that is nobody's any longer."""
    identity = Identity(Ed25519PrivateKey.generate())
    issued = place.authority.issue_client("ghost", request_certificate(identity)).decode()
    ghost = Person(place.participant("ghost").membership.with_certificate(issued), identity)
    with ghost.client() as own:
        assert ghost.ask(own).status == 403
        assert own.signed("GET", "/meadow/v1/terms", b"", {}).status == 403
        with pytest.raises(Exception, match="nobody here has this key"):
            own.renew()


@pytest.mark.usefixtures("unreached")
def test_the_servers_certificate_is_no_participants(place: Site, client: GatewayClient) -> None:
    chain = place.folder / "gateway.pem"
    tls = ssl.create_default_context(cadata=place.authority.certificate.decode())
    tls.load_cert_chain(chain)
    plain = socket.create_connection(("127.0.0.1", place.gateway.port), 5)
    with tls.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        assert said(sock, written("/meadow/v1/health", {}, method="GET", length=False)) == (0, b"")


def test_older_tls_is_not_spoken(place: Site, mallory: Person) -> None:
    tls = client_tls(mallory.membership.authority, mallory.identity, "")
    for version, refused in ((ssl.TLSVersion.TLSv1_3, False), (ssl.TLSVersion.TLSv1_2, True)):
        tls.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        tls.maximum_version = version
        plain = socket.create_connection(("127.0.0.1", place.gateway.port), 5)
        with pytest.raises(ssl.SSLError) if refused else nullcontext(), plain:
            tls.wrap_socket(plain, server_hostname="127.0.0.1").close()


def test_nothing_is_said_in_the_clear(place: Site) -> None:
    with socket.create_connection(("127.0.0.1", place.gateway.port), 5) as plain:
        plain.sendall(written("/meadow/v1/health", {}, method="GET", length=False))
        assert not plain.recv(100).startswith(b"HTTP")


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("how", ["suspend", "revoke"])
def test_who_was_shut_out_is_out_in_all_ways(place: Site, how: str) -> None:
    person = place.participant(f"{how}ed")
    with person.client() as client:
        client.now()
        getattr(place.roster, how)(f"{how}ed")
        assert person.ask(client).status == 403
        for call in (client.terms, client.renew, client.withdraw):
            with pytest.raises(Exception, match=how) as caught:
                call()
            assert getattr(caught.value, "status") == 403  # noqa: B009
    with person.client() as fresh, pytest.raises(Exception, match=how):
        fresh.now()
    bare = replace(person, membership=person.membership.with_certificate(""))
    with bare.client() as enrolling, pytest.raises(Exception, match="(?i)suspend|revoke|invit"):
        enrolling.enrol(person.flower.public_pem)
