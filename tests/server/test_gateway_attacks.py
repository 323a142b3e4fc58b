"""What somebody who holds a valid participant's credentials can try at the gateway.

Requests are written byte by byte to a TLS connection.  Wherever it makes the attack stronger the
tricked request is signed as its sender would sign it, in a session of its own.  Nothing of what is
refused may reach the SuperLink.
"""

from __future__ import annotations

import json
import select
import time
from pathlib import Path

import pytest
from attacks import LARGEST, PUSH, Wire, signed, written
from gateways import RUN, Person, Site, site

from meadow.client.gateway_client import GatewayClient
from meadow.fleet_routes import FLEET_ROUTES
from meadow.server.gateway_limits import MOST_AT_ONCE

pytest_plugins = ("attack_fixtures",)


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
