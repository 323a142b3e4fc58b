"""The participant's conversation with a gateway: addresses, sessions, connections, clocks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import PULL, TERMS, Person, Site, site

from meadow.client.gateway_client import GatewayClient
from meadow.client.gateway_connection import client_tls
from meadow.errors import GatewayError, IdentityError
from meadow.identity import Identity


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.fixture(scope="module")
def anna(place: Site) -> Person:
    return place.participant("anna")


@pytest.fixture
def dead() -> Iterator[str]:
    """An address at which nobody answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{silent.getsockname()[1]}"


def test_addresses_are_tried_in_turn_and_the_good_one_first(
    place: Site, anna: Person, dead: str
) -> None:
    membership = replace(anna.membership, addresses=(dead, place.address))
    with GatewayClient(membership, anna.identity) as client:
        assert client.terms() == TERMS
        assert client._addresses == [place.address, dead]


def test_where_nobody_answers_all_addresses_are_named(anna: Person, dead: str) -> None:
    membership = replace(anna.membership, addresses=(dead, "localhost:1"))
    with GatewayClient(membership, anna.identity) as client, pytest.raises(GatewayError) as caught:
        client.health()
    assert caught.value.status == 0
    assert dead in caught.value.message and "localhost:1" in caught.value.message


def test_a_gateway_that_was_started_anew_is_spoken_with_at_once(tmp_path: Path) -> None:
    with site(tmp_path) as place:
        anna = place.participant("anna")
        with anna.client() as client:
            assert anna.ask(client).status == 200
            before = client.session
            place.restart()
            assert anna.ask(client).status == 200
            assert client.session != before


def test_connections_are_used_again(place: Site, anna: Person) -> None:
    with anna.client() as client:
        for _ in range(5):
            anna.ask(client)
        (idle,) = client._idle
        socket.socket.shutdown(idle._http.sock, socket.SHUT_RDWR)
        assert anna.ask(client).status == 200, "a connection that was idle for long is replaced"


def test_threads_share_a_client(place: Site, anna: Person) -> None:
    results: list[int] = []
    with anna.client() as client:
        threads = [
            threading.Thread(target=lambda: results.append(anna.ask(client).status))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [200] * 8


def test_closing_ends_what_waits(place: Site, anna: Person) -> None:
    client, before = anna.client(), len(place.superlink.seen)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            anna.ask(client, PULL)
        except GatewayError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while len(place.superlink.seen) == before:
        time.sleep(0.01)
    client.close()
    thread.join(10)
    assert len(ended) == 1


def test_the_coordinators_time_does_not_need_ours(anna: Person) -> None:
    ticks = iter(range(10**6))
    with GatewayClient(anna.membership, anna.identity, lambda: -5e8 + next(ticks)) as client:
        first, second = client.now(), client.now()
    assert abs(first - time.time()) < 10 and second - first == 1


def test_another_authority_is_not_trusted(place: Site, anna: Person, tmp_path: Path) -> None:
    with site(tmp_path) as other:
        membership = replace(anna.membership, addresses=(other.address,))
        with GatewayClient(membership, anna.identity) as client:
            with pytest.raises(GatewayError, match="certificate is refused"):
                client.health()


def test_a_participants_certificate_is_no_gateways(place: Site, anna: Person) -> None:
    """Who has one cannot pose as the coordinator."""
    import ssl

    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = anna.identity.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pair = place.folder / "posing.pem"
    pair.write_bytes(key + anna.membership.certificate.encode())
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        posing = replace(anna.membership, addresses=(f"127.0.0.1:{listener.getsockname()[1]}",))

        def serve() -> None:
            plain, _ = listener.accept()
            with plain, pytest.raises(ssl.SSLError):
                tls.wrap_socket(plain, server_side=True).recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with GatewayClient(posing, anna.identity) as client:
            with pytest.raises(GatewayError, match="certificate is refused"):
                client.health()
        thread.join()


def test_a_certificate_for_another_key_is_named(anna: Person) -> None:
    other = Identity(Ed25519PrivateKey.generate())
    with pytest.raises(IdentityError, match="not for this user's key"):
        client_tls(anna.membership.authority, other, anna.membership.certificate)
