"""The forwarder between Flower's own client and a gateway that really listens: what passes through
it, what does not, and how it begins and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from forwarders import Local, local
from gateways import BUNDLE, RUN, Quick, Site, home, site

from meadow.client import forwarder as forwarding
from meadow.client.flower_key import FlowerKey
from meadow.errors import IdentityError
from meadow.fleet_routes import FLEET, GET_FAB

pytest_plugins = ("forwarder_fixtures",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


def test_a_request_goes_through_and_its_bytes_are_counted(machine: Local) -> None:
    answer = machine.ask()
    assert (answer.status_code, answer.content) == (200, b"answer to question")
    assert machine.place.superlink.seen[-1].body == b"question"
    last = json.loads((machine.folder / "traffic.jsonl").read_text().splitlines()[-1])
    expected = {"path": RUN, "status": 200, "up": 8, "down": len(answer.content)}
    assert {key: last[key] for key in expected} == expected


def test_all_that_goes_to_the_gateway_is_in_the_traffic_log(tmp_path: Path) -> None:
    """Sessions, what the forwarder says by itself, and what was tried in vain."""
    with site(tmp_path / "coordinator") as place:
        person = place.participant("counted")
        folder = home(tmp_path / "counted" / "home", person)
        with local(place, person, folder) as machine:
            machine.ask()
            machine.forwarder._uplink.refusal(0, "a reason")
            place.restart()
            machine.ask()
        rows = [json.loads(line) for line in (folder / "traffic.jsonl").read_text().splitlines()]
    sessions = [row for row in rows if row["path"] == "/meadow/v1/session"]
    (refusal,) = [row for row in rows if row["path"] == "/meadow/v1/refusal"]
    asked = [row["status"] for row in rows if row["path"] == RUN]
    assert [row["status"] for row in sessions] == [200, 200] and sessions[0]["up"] > 40
    assert refusal["status"] == 200 and refusal["up"] == len('{"round": 0, "reason": "a reason"}')
    assert asked.count(200) == 2 and 401 in asked  # the first, in vain, in the old session


def test_flowers_own_client_is_served(machine: Local) -> None:
    """The SuperNode's code, against a fake SuperLink that answers in protobuf."""
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.proto.message_pb2 import Message
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = machine.person.flower.private
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    address = f"127.0.0.1:{machine.forwarder.port}"
    root = (machine.folder / "forwarder-authority.pem").read_bytes()
    expected = PullMessagesResponse(messages_list=[Message()])
    machine.place.superlink.messages.append(expected.SerializeToString())
    with FleetHttpClient.from_server_address(address, False, root, interceptors) as client:
        assert client.PullMessages(PullMessagesRequest(node=Node(node_id=7))) == expected
    seen = machine.place.superlink.seen[-1]
    assert PullMessagesRequest.FromString(seen.body).node.node_id == 7
    assert {"flwr-package-name", "flwr-package-version", "flwr-component-name"} <= seen.names
    machine.ask(FLEET + "confirm-message-received")


@pytest.mark.parametrize("hours", [-24.0, 24.0, 24.0 * 365])
def test_a_clock_that_is_wrong_does_no_harm(place: Site, tmp_path: Path, hours: float) -> None:
    """What the SuperLink sees was signed at its own time, with the participant's key."""
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    person = place.participant(f"clock{hours:g}")
    folder = home(tmp_path / "home", person)
    with local(place, person, folder, lambda: time.time() + hours * 3600) as machine:
        assert machine.ask().status_code == 200
    headers = dict(place.superlink.seen[-1].headers)
    text = headers["flwr-timestamp"]
    assert abs(datetime.fromisoformat(text).timestamp() - time.time()) < 60
    key = bytes_to_public_key(b64decode(headers["flwr-public-key"]))
    assert verify_signature(key, text.encode(), b64decode(headers["flwr-signature"]))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/control/start-run", 404),
        ("POST", "/v1/runtime/acquire-task", 404),
        ("POST", "/v1/fleet/get-run?x", 404),
        ("POST", "/v1/fleet//get-run", 404),
        ("POST", "/meadow/v1/withdraw", 404),
        ("GET", RUN, 404),
    ],
)
def test_only_what_a_supernode_needs_exists(
    machine: Local, method: str, path: str, status: int
) -> None:
    before = len(machine.place.superlink.seen)
    headers = machine.person.flower.headers(time.time())
    answer = machine.http.request(method, machine.base + path, headers=headers)
    assert answer.status_code == status and len(machine.place.superlink.seen) == before


def test_other_programs_on_the_machine_cannot_use_it(machine: Local) -> None:
    other = machine.place.participant("neighbour").flower
    own, now = machine.person.flower, time.time()
    forged = {**other.headers(now), "flwr-public-key": own.headers(now)["flwr-public-key"]}
    before = len(machine.place.superlink.seen)
    for headers in (
        other.headers(now),
        forged,
        own.headers(now - 400),
        {**own.headers(now), "flwr-timestamp": "2020-01-01T00:00:00+00:00"},
        {**own.headers(now), "flwr-timestamp": "soon"},
        {**own.headers(now), "flwr-signature": "?"},
    ):
        assert machine.ask(headers=headers).status_code == 403
    assert machine.http.post(machine.base + RUN, content=b"").status_code == 403
    assert len(machine.place.superlink.seen) == before


def test_bodies_are_bounded(machine: Local) -> None:
    headers = {"Content-Length": str(16 * 2**20 + 1), **machine.person.flower.headers(time.time())}
    lines = [f"POST {RUN} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in headers.items())]
    trusted = ssl.create_default_context(cafile=str(machine.folder / "forwarder-authority.pem"))
    plain = socket.create_connection(("127.0.0.1", machine.forwarder.port), 5)
    with trusted.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


# --- bundles -----------------------------------------------------------------------------------


def fab(content: bytes) -> bytes:
    from flwr.proto.fab_pb2 import Fab, GetFabResponse

    digest = hashlib.sha256(content).hexdigest()
    made: bytes = GetFabResponse(fab=Fab(hash_str=digest, content=content)).SerializeToString()
    return made


def test_the_own_bundle_passes(machine: Local) -> None:
    machine.place.superlink.answers[GET_FAB] = (200, fab(BUNDLE))
    answer = machine.ask(GET_FAB)
    assert (answer.status_code, answer.content) == (200, fab(BUNDLE))


def test_a_bundle_with_code_is_refused_and_the_coordinator_told(machine: Local) -> None:
    last = max((note.id for note in machine.place.roster.notes()), default=0)
    machine.place.superlink.answers[GET_FAB] = (200, fab(BUNDLE + b"import os"))
    answer = machine.ask(GET_FAB)
    assert answer.status_code == 403 and b"import os" not in answer.content
    end = time.monotonic() + 10
    while not (notes := machine.place.roster.notes(last)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [(note.kind, note.name) for note in notes] == [("refusal", "anna")]
    assert "bundle" in notes[0].text


# --- as a process ------------------------------------------------------------------------------


def test_it_ends_when_it_is_asked_to(place: Site, tmp_path: Path) -> None:
    person = place.participant("process")
    folder = home(tmp_path / "home", person)
    (tmp_path / "user").mkdir()
    os.replace(tmp_path / "home-identity.pem", tmp_path / "user" / "identity.pem")
    ready = folder / "forwarder.port"
    command = [sys.executable, "-m", "meadow.client.forwarder", "--folder", str(folder)]
    command += ["--bundle", str(tmp_path / "bundle.fab"), "--ready", str(ready)]
    variables = {**os.environ, "MEADOW_HOME": str(tmp_path / "user")}
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "listening" in said and "Traceback" not in said


def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bundle").write_bytes(BUNDLE)
    arguments = ["--folder", str(tmp_path), "--bundle", str(tmp_path / "bundle")]
    with pytest.raises(SystemExit) as caught:
        forwarding.main([*arguments, "--ready", str(tmp_path / "ready")])
    assert caught.value.code == 2 and "flower-key" in caplog.text


def test_a_flower_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "flower-key"
    made = FlowerKey.load_or_create(path, Quick())
    assert FlowerKey.load_or_create(path, Quick()).public_pem == made.public_pem
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        FlowerKey.load(path)
