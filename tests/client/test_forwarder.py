"""The forwarder between Flower's own client and a gateway that really listens."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import BUNDLE, PULL, RUN, Person, Quick, Site, home, options_of, site

from meadow.client import forwarder as forwarding
from meadow.client.flower_key import FlowerKey
from meadow.client.forwarder import Forwarder
from meadow.client.gateway_client import Enrolment, GatewayClient
from meadow.client.key_rotation import rotate_identity
from meadow.client.membership import Membership
from meadow.client.uplink import Uplink
from meadow.errors import GatewayError, IdentityError
from meadow.fleet_routes import FLEET, GET_FAB, HEARTBEAT
from meadow.identity import Identity

DAY = 86400.0


@dataclass
class Local:
    """A participant's machine with a forwarder that runs."""

    place: Site
    person: Person
    folder: Path
    forwarder: Forwarder
    http: httpx.Client
    clock: Any

    @property
    def base(self) -> str:
        return f"https://127.0.0.1:{self.forwarder.port}"

    def ask(self, path: str = RUN, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """A request as the SuperNode makes it."""
        flower = self.person.flower.headers(self.clock()) if headers is None else headers
        return self.http.post(self.base + path, content=b"question", headers=flower)


@contextmanager
def local(place: Site, person: Person, folder: Path, clock: Any = time.time) -> Iterator[Local]:
    forwarder = Forwarder(options_of(folder), Quick(), clock)
    running = forwarder.running()
    place.run(running.__aenter__())
    try:
        trusted = ssl.create_default_context(cafile=str(folder / "forwarder-authority.pem"))
        with httpx.Client(verify=trusted, timeout=30) as http:
            yield Local(place, person, folder, forwarder, http, clock)
    finally:
        place.run(running.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.fixture(scope="module")
def machine(place: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    anna = place.participant("anna")
    folder = home(tmp_path_factory.mktemp("anna") / "home", anna)
    with local(place, anna, folder) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for as long as in earnest."""
    monkeypatch.setattr(forwarding, "PATIENCE", 1.5)


def test_a_request_goes_through_and_its_bytes_are_counted(machine: Local) -> None:
    answer = machine.ask()
    assert (answer.status_code, answer.content) == (200, b"answer to question")
    assert machine.place.superlink.seen[-1].body == b"question"
    last = json.loads((machine.folder / "traffic.jsonl").read_text().splitlines()[-1])
    expected = {"path": RUN, "status": 200, "up": 8, "down": len(answer.content)}
    assert {key: last[key] for key in expected} == expected


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


def test_a_closed_uplink_opens_nothing(place: Site, tmp_path: Path) -> None:
    """A thread may begin its work only when the forwarder is already ending."""
    person = place.participant("late")
    uplink = uplink_of(person, home(tmp_path / "home", person))
    uplink.close()
    with pytest.raises(GatewayError, match="ending"):
        uplink.renew_if_due()


# --- faults ------------------------------------------------------------------------------------


def test_a_gateway_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            assert machine.ask().status_code == 200
            place.stop()
            back = threading.Timer(1.0, place.restart)
            back.start()
            answer = machine.ask()
            back.join()
            assert (answer.status_code, answer.content) == (200, b"answer to question")


def test_a_failure_that_passes_is_not_told(tmp_path: Path) -> None:
    """A SuperNode would take it for its answer, and drop what it was sending."""
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            place.superlink.answers[RUN] = (500, b"database is locked")
            mended = threading.Timer(1.0, place.superlink.answers.clear)
            mended.start()
            answer = machine.ask()
            mended.join()
            assert (answer.status_code, answer.content) == (200, b"answer to question")


@pytest.mark.usefixtures("patient")
def test_a_failure_that_stays_is_told(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            place.superlink.answers[RUN] = (500, b"database is locked")
            assert machine.ask().status_code == 500
            assert sum(seen.path == RUN for seen in place.superlink.seen) > 1


@pytest.mark.usefixtures("patient")
def test_while_the_gateway_is_away_the_supernode_is_told_to_ask_again(tmp_path: Path) -> None:
    """503: on 401 a SuperNode would end itself, on 403 forget its message."""
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            assert machine.ask().status_code == 200
            place.stop()
            for path in (RUN, HEARTBEAT):
                answer = machine.ask(path)
                assert answer.status_code == 503 and "cannot be reached" in answer.json()["error"]
            place.restart()
            assert machine.ask().status_code == 200


def test_who_is_suspended_waits(place: Site, tmp_path: Path) -> None:
    person = place.participant("paused")
    with local(place, person, home(tmp_path / "home", person)) as machine:
        place.roster.suspend("paused")
        answer = machine.ask()
        assert answer.status_code == 503 and "suspended" in answer.json()["error"]
        place.roster.resume("paused")
        assert machine.ask().status_code == 200


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_the_superlinks_own_word_reaches_the_supernode(machine: Local, status: int) -> None:
    machine.place.superlink.answers[RUN] = (status, b'{"detail": "because"}')
    try:
        answer = machine.ask()
    finally:
        del machine.place.superlink.answers[RUN]
    assert (answer.status_code, answer.content) == (status, b'{"detail": "because"}')


def test_doubts_about_the_time_are_cleared_up_once(machine: Local) -> None:
    """A SuperLink's 401 may be about the clock: a new session tells the time anew."""
    machine.place.superlink.answers[RUN] = (401, b"{}")
    before = len(machine.place.superlink.seen)
    try:
        assert machine.ask().status_code == 401
    finally:
        del machine.place.superlink.answers[RUN]
    assert len(machine.place.superlink.seen) == before + 2


def test_signs_of_life_keep_the_supernode_waiting(
    machine: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange may take longer than Flower's time-outs, as on a slow link."""
    monkeypatch.setattr(forwarding, "_SIGN_OF_LIFE", 0.1)
    timer = threading.Timer(1.2, lambda: machine.place.superlink.messages.append(b"late"))
    timer.start()
    machine.http.timeout = httpx.Timeout(0.6)
    try:
        assert machine.ask(PULL).content == b"late"
    finally:
        timer.join()
        machine.http.timeout = httpx.Timeout(30)
        machine.ask(FLEET + "confirm-message-received")


def test_a_coordinator_that_moved_is_followed(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        folder = home(tmp_path / "home", anna)
        with local(place, anna, folder) as machine:
            assert machine.ask().status_code == 200
            old = place.address
            place.stop()
            place.move()
            assert place.address != old
            replace(anna.membership, addresses=(old, place.address)).save(folder, Quick())
            assert machine.ask().status_code == 200


def test_the_port_and_the_certificate_survive_a_restart(place: Site, tmp_path: Path) -> None:
    """A SuperNode that was not restarted finds the forwarder again."""
    person = place.participant("steady")
    folder = home(tmp_path / "home", person)
    with local(place, person, folder) as machine:
        port, trusted = machine.forwarder.port, (folder / "forwarder-authority.pem").read_bytes()
        assert (folder / "forwarder.port").read_text() == str(port)
    with local(place, person, folder) as machine:
        assert machine.forwarder.port == port
        assert (folder / "forwarder-authority.pem").read_bytes() == trusted
        assert machine.ask().status_code == 200
    with socket.create_server(("127.0.0.1", port)):
        with local(place, person, folder) as machine:
            assert machine.forwarder.port not in (0, port)


# --- certificates ------------------------------------------------------------------------------


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
