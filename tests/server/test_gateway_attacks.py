"""What somebody who holds a valid participant's credentials can try at the gateway.

Requests are written byte by byte to a TLS connection.  Wherever it makes the attack stronger the
tricked request is signed as its sender would sign it, in a session of its own.  Nothing of what is
refused may reach the SuperLink.
"""

from __future__ import annotations

import base64
import http.client
import json
import select
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import RUN, Person, Quick, Site, site

from meadow.certificate_request import request_certificate
from meadow.client.gateway_client import GatewayClient
from meadow.client.gateway_connection import client_tls
from meadow.fleet_routes import FLEET, FLEET_ROUTES
from meadow.identity import Identity
from meadow.server.authority import Authority
from meadow.server.gateway_limits import MOST_AT_ONCE

LARGEST = 200_000
PUSH = FLEET + "push-object"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator"), largest=LARGEST, grace=0.5) as running:
        yield running


@pytest.fixture(scope="module")
def mallory(place: Site) -> Person:
    """An approved participant who means no good."""
    return place.participant("mallory")


@pytest.fixture(scope="module")
def bob(place: Site) -> Person:
    return place.participant("bob")


@pytest.fixture
def client(mallory: Person) -> Iterator[GatewayClient]:
    with mallory.client() as made:
        made.now()  # opens a session
        yield made


@pytest.fixture
def unreached(place: Site) -> Iterator[None]:
    """Nothing may have reached the SuperLink in the end."""
    before = len(place.superlink.seen)
    yield
    assert place.superlink.seen[before:] == []


@dataclass
class Wire:
    """A TLS connection to the gateway, on which anything can be written."""

    place: Site
    person: Person
    sock: ssl.SSLSocket = field(init=False)

    def __post_init__(self) -> None:
        tls = client_tls(
            self.person.membership.authority,
            self.person.identity,
            self.person.membership.certificate,
        )
        plain = socket.create_connection(("127.0.0.1", self.place.gateway.port), 5)
        self.sock = tls.wrap_socket(plain, server_hostname="127.0.0.1")
        self.certificate = self.sock.getpeercert(binary_form=True) or b""

    def say(self, data: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; (0, b"") where the connection just ends."""
        return said(self.sock, data)

    def close(self) -> None:
        self.sock.close()


def said(sock: ssl.SSLSocket, data: bytes) -> tuple[int, bytes]:
    try:
        sock.sendall(data)
    except OSError:
        pass  # refused before all was said: the answer may be there
    try:
        method = "HEAD" if data.startswith(b"HEAD ") else None  # whose answer has no body
        answer = http.client.HTTPResponse(sock, method=method)
        answer.begin()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


@pytest.fixture
def wire(place: Site, mallory: Person) -> Iterator[Wire]:
    made = Wire(place, mallory)
    yield made
    made.close()


def written(
    target: str,
    headers: Mapping[str, str] | list[tuple[str, str]],
    body: bytes = b"",
    method: str = "POST",
    version: str = "HTTP/1.1",
    length: bool = True,
) -> bytes:
    """A request as bytes."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    if length:
        pairs.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} {version}", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in pairs]
    return "\r\n".join([*lines, "", ""]).encode() + body


def signed(
    wire: Wire,
    client: GatewayClient,
    target: str = RUN,
    body: bytes = b"question",
    method: str = "POST",
) -> dict[str, str]:
    """All headers that a good request has, signed for exactly this target and body."""
    signature = client._signer.headers(method, target, body, wire.certificate)
    return {**wire.person.headers(client), **signature}


def test_the_good_request_that_all_attacks_start_from(wire: Wire, client: GatewayClient) -> None:
    status, body = wire.say(written(RUN, signed(wire, client), b"question"))
    assert (status, body) == (200, b"answer to question")


# --- routes ------------------------------------------------------------------------------------


def superlink_routes() -> list[tuple[str, str]]:
    """Method and path of everything that Flower's SuperLink serves."""
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    found = set()
    for context in iter_route_contexts(create_app().routes):
        for method in getattr(context.route, "methods", None) or ():
            found.add((method, str(context.path)))
    return sorted(found)


@pytest.mark.usefixtures("unreached")
def test_of_the_superlinks_routes_only_those_of_a_supernode_exist(
    place: Site, mallory: Person, client: GatewayClient
) -> None:
    routes = superlink_routes()
    assert {path for method, path in routes if method == "POST"} >= FLEET_ROUTES
    others = [route for route in routes if route not in {("POST", path) for path in FLEET_ROUTES}]
    areas = {path.split("/")[2] for _, path in others if path.startswith("/v1/")}
    assert {"control", "runtime"} <= areas and len(others) > 60
    statuses = {}
    for method, path in others:
        target = path.replace("{", "").replace("}", "")
        body = b"" if method in ("GET", "HEAD") else b"x"
        answer = client.signed(method, target, body, mallory.headers(client))
        statuses[method, path] = answer.status
    assert set(statuses.values()) == {404}


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "post"])
def test_fleet_routes_know_one_method(wire: Wire, client: GatewayClient, method: str) -> None:
    headers = signed(wire, client, body=b"", method=method)
    status, _ = wire.say(written(RUN, headers, method=method))
    assert status in (400, 404)


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize(
    "target",
    [
        "//v1/fleet/get-run",
        "/v1//fleet/get-run",
        "/v1/./fleet/get-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/../fleet/get-run",
        "/v1/fleet/%67et-run",
        "/v1/fleet%2fget-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run?x=1",
        "/v1/fleet/get-run?",
        "/v1/fleet/get-run#x",
        "/v1/fleet/get-run/",
        "/v1/fleet/get-run;x",
        "/V1/fleet/get-run",
        "/v1/fleet/GET-RUN",
        "/v1/fleet/get-run%00",
        "/v1/fleet/get-run\\",
        "/v1/fleet/",
        "/v1/fleet",
        "/",
        "*",
        "https://127.0.0.1/v1/fleet/get-run",
        "http://127.0.0.1:9/v1/control/start-run",
        "127.0.0.1:443",
        "v1/fleet/get-run",
        "/meadow/v1/terms/../../../v1/control/start-run",
        "/meadow/v1/health?",
    ],
)
def test_targets_are_compared_byte_for_byte(wire: Wire, client: GatewayClient, target: str) -> None:
    status, _ = wire.say(written(target, signed(wire, client, target), b"question"))
    assert status in (400, 404)


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTCPCP/1.0"])
def test_only_http_1_1_is_spoken(wire: Wire, client: GatewayClient, version: str) -> None:
    request = written(RUN, signed(wire, client), b"question", version=version)
    assert wire.say(request)[0] in (0, 400, 505)


@pytest.mark.usefixtures("unreached")
def test_tunnels_are_not_dug(wire: Wire, client: GatewayClient) -> None:
    target = "127.0.0.1:443"
    headers = signed(wire, client, target, b"", "CONNECT")
    assert wire.say(written(target, headers, method="CONNECT"))[0] in (400, 404)


# --- headers -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize(
    "extra",
    [
        {"Transfer-Encoding": "chunked"},
        {"Transfer-Encoding": "identity"},
        {"Transfer-Encoding": "xchunked"},
        {"Transfer-Encoding ": "chunked"},
        {"Content-Length": "3"},
        {"content-length": "8"},
        {"Content-Encoding": "gzip"},
        {"Upgrade": "websocket", "Connection": "Upgrade"},
        {"Trailer": "Meadow-Sequence"},
        {"Expect": "100-continue"},
        {"meadow-session": "00" * 16},
        {"MEADOW-SEQUENCE": "1"},
        {"Flwr-Public-Key": "x"},
        {"host": "elsewhere.example"},
        {"X": "a\rb"},
        {"X": "a\n Meadow-Session: b"},
        {"X\x00": "a"},
    ],
)
def test_a_request_cannot_be_read_in_two_ways(
    wire: Wire, client: GatewayClient, extra: dict[str, str]
) -> None:
    headers = [*signed(wire, client).items(), *extra.items()]
    status, _ = wire.say(written(RUN, headers, b"question"))
    assert status in (400, 417)


@pytest.mark.usefixtures("unreached")
def test_a_second_request_is_not_smuggled_in_a_body(wire: Wire, client: GatewayClient) -> None:
    inner = written("/v1/control/start-run", {}, b"x")
    chunked = b"0\r\n\r\n" + inner
    headers = [*signed(wire, client, body=chunked).items(), ("Transfer-Encoding", "chunked")]
    assert wire.say(written(RUN, headers, chunked))[0] == 400
    assert wire.say(b"")[0] == 0, "the connection has ended, and nothing answers the inner request"


@pytest.mark.usefixtures("unreached")
def test_a_chunked_body_is_no_body(wire: Wire, client: GatewayClient) -> None:
    headers = [*signed(wire, client).items(), ("Transfer-Encoding", "chunked")]
    body = b"8\r\nquestion\r\n0\r\n\r\n"
    assert wire.say(written(RUN, headers, body, length=False))[0] == 400


@pytest.mark.usefixtures("unreached")
def test_a_body_without_length_is_refused(wire: Wire, client: GatewayClient) -> None:
    request = written(RUN, signed(wire, client, body=b""), b"", length=False)
    assert wire.say(request)[0] == 411


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("length", ["-1", "+8", "0x8", "8, 8", "8 8", "1e1", "", "9" * 30])
def test_lengths_are_plain_numbers(wire: Wire, client: GatewayClient, length: str) -> None:
    headers = {**signed(wire, client), "Content-Length": length}
    assert wire.say(written(RUN, headers, b"question", length=False))[0] in (400, 413)


def test_what_others_would_trust_is_not_passed_on(
    place: Site, wire: Wire, client: GatewayClient
) -> None:
    extra = {
        "X-Forwarded-For": "127.0.0.1",
        "X-Forwarded-Host": "localhost",
        "Forwarded": "for=127.0.0.1",
        "X-Original-URL": "/v1/control/start-run",
        "X-HTTP-Method-Override": "PUT",
        "Authorization": "Bearer x",
        "flwr-task-token": "x",
        "flwr-superexec-signature": "x",
        "Connection": "flwr-public-key, keep-alive",
        "TE": "trailers",
    }
    assert wire.say(written(RUN, {**signed(wire, client), **extra}, b"question"))[0] == 200
    names = place.superlink.seen[-1].names
    assert not names & {name.lower() for name in extra}
    assert not {name for name in names if name.startswith("meadow")}
    assert "flwr-public-key" in names


@pytest.mark.usefixtures("unreached")
def test_headers_are_bounded(wire: Wire, client: GatewayClient) -> None:
    many = {f"X-{number}": "x" * 50 for number in range(5000)}
    assert wire.say(written(RUN, {**signed(wire, client), **many}, b"question"))[0] in (0, 400)


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


# --- bodies ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreached")
def test_a_body_that_is_too_large_is_refused_before_it_comes(
    wire: Wire, client: GatewayClient
) -> None:
    """Only its length is sent."""
    headers = {**signed(wire, client, PUSH), "Content-Length": str(LARGEST + 1)}
    assert wire.say(written(PUSH, headers, length=False))[0] == 413


@pytest.mark.usefixtures("unreached")
def test_small_routes_take_small_bodies(wire: Wire, client: GatewayClient) -> None:
    body = bytes(64 * 1024 + 1)
    assert wire.say(written(RUN, signed(wire, client, body=body), body))[0] == 413


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("path", [PUSH, "/meadow/v1/enrol"])
def test_a_body_that_comes_too_slowly_is_refused(
    wire: Wire, client: GatewayClient, path: str
) -> None:
    headers = {**signed(wire, client, path), "Content-Length": "8"}
    status, body = wire.say(written(path, headers, b"quest", length=False))
    assert status == 408 and b"slowly" in body


@pytest.mark.usefixtures("unreached")
def test_a_body_that_breaks_off_counts_for_nothing(wire: Wire, client: GatewayClient) -> None:
    headers = {**signed(wire, client), "Content-Length": "8"}
    wire.sock.sendall(written(RUN, headers, b"quest", length=False))
    wire.sock.close()
    time.sleep(0.1)  # what would reach the SuperLink is there by now


@pytest.mark.usefixtures("unreached")
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 60_000, b'{"x": 1}'])
@pytest.mark.parametrize("path", ["/meadow/v1/enrol", "/meadow/v1/renew", "/meadow/v1/refusal"])
def test_bodies_that_are_not_what_is_asked_for_get_a_line(
    wire: Wire, client: GatewayClient, path: str, body: bytes
) -> None:
    status, answer = wire.say(written(path, signed(wire, client, path, body), body))
    assert status == 400 and json.loads(answer)["error"]


def test_so_many_requests_at_a_time_are_enough(tmp_path: Path) -> None:
    """Here: pushes whose bodies do not come."""
    more = 5
    with site(tmp_path) as place:
        bob = place.participant("bob")
        request = written(PUSH, {**bob.flower.headers(time.time()), "Content-Length": "8"}, b"qu")
        wires = [Wire(place, bob) for _ in range(MOST_AT_ONCE + more)]
        for wire in wires:
            wire.sock.sendall(request.replace(b"Content-Length: 2\r\n", b""))
        answered: list[Wire] = []
        while len(answered) < more:
            ready, _, _ = select.select([w.sock for w in wires if w not in answered], [], [], 10)
            assert ready, "the gateway takes all of them"
            answered += [wire for wire in wires if wire.sock in ready]
        statuses = [wire.say(b"")[0] for wire in answered]
        for wire in wires:
            wire.close()
    assert statuses == [429] * more
