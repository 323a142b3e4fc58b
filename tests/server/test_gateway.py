"""The gateway with real sockets: enrolment, sessions, what passes and how, and the long poll."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from announcements import announcement, metadata
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateways import PULL, RUN, TERMS, Person, Site, site

from meadow import __version__
from meadow.certificate_request import request_certificate, rotation_proof
from meadow.client.gateway_client import GatewayClient
from meadow.client.membership import Membership
from meadow.errors import GatewayError
from meadow.fleet_routes import FLEET, FLEET_ROUTES, PUBLIC_KEY, PUSH_MESSAGES
from meadow.identity import Identity
from meadow.server import gateway, gateway_superlink


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.fixture(scope="module")
def anna(place: Site) -> Person:
    return place.participant("anna")


@pytest.fixture
def client(anna: Person) -> Iterator[GatewayClient]:
    with anna.client() as made:
        yield made


def test_the_port_is_told_and_health_is_for_anybody(place: Site) -> None:
    assert (place.folder / "gateway.port").read_text() == str(place.gateway.port)
    stranger = Person(Membership.of(place.invite("stranger")))
    with stranger.client() as client:
        assert client.health() == {"meadow": __version__, "format": 1}


def test_enrolment_waits_for_approval_and_is_told_what_was_approved(place: Site) -> None:
    person = Person(Membership.of(place.invite("berta")))
    with person.client() as client:
        pending = client.enrol(person.flower.public_pem)
        assert (pending.status, pending.certificate) == ("pending", "")
        node = 2**64 - 1
        place.roster.approve("berta", node)
        found = client.enrol(person.flower.public_pem)
    known = place.roster.by_name("berta")
    assert known is not None and known.key == person.identity.public.public_bytes_raw()
    assert found.fingerprint == pending.fingerprint == known.fingerprint
    assert (found.name, found.status, found.node_id) == ("berta", "approved", str(node))
    assert found.authority.encode() == place.authority.certificate
    certificate = x509.load_pem_x509_certificate(found.certificate.encode())
    assert certificate.not_valid_after_utc.timestamp() == known.certificate_expires


def test_an_invitation_is_for_one_key(place: Site, anna: Person) -> None:
    thief = Person(anna.membership.with_certificate(""))
    with thief.client() as client, pytest.raises(GatewayError) as caught:
        client.enrol(thief.flower.public_pem)
    assert caught.value.status == 403


def test_an_unknown_invitation_is_refused(place: Site, anna: Person) -> None:
    person = Person(replace(anna.membership, token="00" * 16, certificate=""))
    with person.client() as client, pytest.raises(GatewayError) as caught:
        client.enrol(person.flower.public_pem)
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"meadow": "99.1.0"}, 409),
        ({"format": 2}, 400),
        ({"token": "short"}, 400),
        ({"csr": "nonsense"}, 401),
        ({"flower_key": "nonsense"}, 403),
        ({"csr": 7}, 400),
    ],
)
def test_a_malformed_enrolment_is_refused_with_a_line(
    place: Site, anna: Person, change: dict[str, object], status: int
) -> None:
    fields = {
        "format": 1,
        "token": "00" * 16,
        "csr": request_certificate(anna.identity).decode(),
        "flower_key": anna.flower.public_pem,
        "meadow": __version__,
    }
    with Person(anna.membership.with_certificate("")).client() as client:
        body = json.dumps(fields | change).encode()
        answer = client._exchange("POST", "/meadow/v1/enrol", body, lambda certificate: {})
    assert answer.status == status
    said = json.loads(answer.body)
    assert said["error"] and "\n" not in said["error"] + said["hint"]


def test_terms_are_handed_on_byte_for_byte(client: GatewayClient) -> None:
    assert client.terms() == TERMS


def test_terms_that_are_not_there_yet(place: Site, client: GatewayClient) -> None:
    (place.folder / "terms.json").rename(place.folder / "away")
    try:
        with pytest.raises(GatewayError, match="no run yet") as caught:
            client.terms()
    finally:
        (place.folder / "away").rename(place.folder / "terms.json")
    assert caught.value.status == 503


@pytest.mark.parametrize("path", sorted(FLEET_ROUTES - {PULL}))
def test_fleet_requests_pass_with_what_flower_needs_and_nothing_else(
    place: Site, anna: Person, client: GatewayClient, path: str
) -> None:
    extra = {"X-Forwarded-For": "10.0.0.1", "Cookie": "a=b", "flwr-superexec-signature": "x"}
    headers = {**anna.headers(client), "flwr-package-version": "1.41.0", **extra}
    body = _announced(place) if path == PUSH_MESSAGES else b"question"
    answer = client.signed("POST", path, body, headers)
    assert (answer.status, answer.body) == (200, b"answer to " + body[:20])
    assert "server" not in answer.headers or "secret" not in answer.headers["server"]
    assert not {"location", "set-cookie"} & answer.headers.keys()
    assert answer.headers["flwr-version-incompatibility-message"] == "a newer one"
    seen = place.superlink.seen[-1]
    assert (seen.method, seen.path, seen.body) == ("POST", path, body)
    assert dict(seen.headers)[PUBLIC_KEY] == headers[PUBLIC_KEY]
    flower = {"flwr-public-key", "flwr-timestamp", "flwr-signature", "flwr-package-version"}
    assert seen.names - {"accept"} == flower | {"host", "content-type", "content-length"}


def _announced(place: Site, question: str = "ab" * 32) -> bytes:
    """What anna may announce: her own answer to a question."""
    known = place.roster.by_name("anna")
    assert known is not None
    return announcement(known.node_id, metadata(known.node_id, question))


def test_a_large_object_arrives_whole(place: Site, anna: Person, client: GatewayClient) -> None:
    data = bytes(range(256)) * 4000
    assert anna.ask(client, FLEET + "push-object", data).status == 200
    assert place.superlink.seen[-1].body == data
    place.superlink.answers[FLEET + "pull-object"] = (200, data)
    assert anna.ask(client, FLEET + "pull-object").body == data


@pytest.mark.parametrize("status", [401, 403, 500])
def test_the_superlinks_own_refusals_pass(
    place: Site, anna: Person, client: GatewayClient, status: int
) -> None:
    place.superlink.answers[RUN] = (status, b'{"detail": "no"}')
    try:
        answer = anna.ask(client)
    finally:
        del place.superlink.answers[RUN]
    assert (answer.status, answer.body) == (status, b'{"detail": "no"}')
    assert "meadow-refusal" not in answer.headers


def test_redirects_stay_inside(place: Site, anna: Person, client: GatewayClient) -> None:
    place.superlink.answers[RUN] = (307, b"")
    try:
        answer = anna.ask(client)
    finally:
        del place.superlink.answers[RUN]
    assert answer.status == 502 and "location" not in answer.headers


def test_a_message_that_comes_later_ends_the_wait(
    place: Site, anna: Person, client: GatewayClient
) -> None:
    before = len(place.superlink.seen)
    timer = threading.Timer(0.6, lambda: place.superlink.messages.append(b"a message"))
    timer.start()
    answer = anna.ask(client, PULL)
    timer.join()
    assert answer.body == b"a message"
    assert len(place.superlink.seen) - before >= 2
    assert anna.ask(client, FLEET + "confirm-message-received").status == 200


def test_without_a_message_the_answer_is_empty_in_the_end(
    place: Site, anna: Person, client: GatewayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gateway_superlink.HOLD_SECONDS < 30 - 5  # Flower's own time-out, and some room
    monkeypatch.setattr(gateway_superlink.SuperLink, "_pause", _at_once)
    times = iter([0.0, 1.0, gateway_superlink.HOLD_SECONDS])
    clock = type("Clock", (), {"monotonic": lambda: next(times)})
    monkeypatch.setattr(gateway_superlink, "time", clock)
    before = len(place.superlink.seen)
    assert anna.ask(client, PULL).body == b""
    assert len(place.superlink.seen) - before == 2


async def _at_once(self: object) -> None: ...


def test_an_unconfirmed_message_is_delivered_again(
    place: Site, anna: Person, client: GatewayClient
) -> None:
    place.superlink.messages += [b"first", b"second"]
    assert anna.ask(client, PULL).body == b"first"
    assert anna.ask(client, PULL).body == b"first"  # its answer, or its reader, was lost
    anna.ask(client, FLEET + "confirm-message-received")
    assert anna.ask(client, PULL).body == b"second"
    anna.ask(client, FLEET + "confirm-message-received")


def test_an_answer_that_is_announced_again_gets_the_same_receipt(
    place: Site, anna: Person, client: GatewayClient
) -> None:
    """The SuperLink would refuse it, and the answer's objects would never be sent."""
    push = PUSH_MESSAGES

    def announce(question: str) -> bytes:
        return anna.ask(client, push, _announced(place, question)).body

    def reached() -> int:
        return sum(seen.path == push for seen in place.superlink.seen)

    before = reached()
    place.superlink.answers[push] = (200, b"send these objects")
    assert announce("an answer") == b"send these objects"
    place.superlink.answers[push] = (200, b"send nothing")
    assert announce("an answer") == b"send these objects" and reached() == before + 1
    assert announce("another answer") == b"send nothing" and reached() == before + 2
    place.superlink.answers[push] = (503, b"not now")
    assert announce("a third") == b"not now"
    place.superlink.answers[push] = (200, b"send that")
    assert announce("a third") == b"send that"
    del place.superlink.answers[push]


def test_a_newer_question_ends_the_older_ones_wait(
    place: Site, anna: Person, client: GatewayClient
) -> None:
    """Else the message would go to a connection that nobody reads."""
    client.now()
    answers: list[bytes] = []
    older = threading.Thread(target=lambda: answers.append(anna.ask(client, PULL).body))
    before = len(place.superlink.seen)
    older.start()
    while len(place.superlink.seen) == before:
        time.sleep(0.01)
    newer: list[bytes] = []
    thread = threading.Thread(target=lambda: newer.append(anna.ask(client, PULL).body))
    thread.start()
    older.join(15)
    place.superlink.messages.append(b"late")
    thread.join(15)
    assert (answers, newer) == ([b""], [b"late"])
    anna.ask(client, FLEET + "confirm-message-received")


def test_notes_reach_the_inbox(place: Site, anna: Person, client: GatewayClient) -> None:
    last = max((note.id for note in place.roster.notes()), default=0)
    client.refusal(7, "too many steps\nand more")
    client.withdraw()
    refusal, withdrawal = place.roster.notes(last)
    assert (refusal.kind, refusal.name) == ("refusal", "anna")
    assert refusal.text.startswith("round 7: too many steps") and "\n" not in refusal.text
    assert (withdrawal.kind, withdrawal.name) == ("withdraw", "anna")


def test_notes_are_bounded(place: Site) -> None:
    talker = place.participant("talker")
    with talker.client() as client:
        for _ in range(60):
            client.withdraw()
        with pytest.raises(GatewayError, match="notes an hour") as caught:
            client.withdraw()
    assert caught.value.status == 429


def test_who_was_suspended_is_refused_from_the_next_request_on(place: Site) -> None:
    carla = place.participant("carla")
    with carla.client() as client:
        assert carla.ask(client).status == 200
        place.roster.suspend("carla")
        answer = carla.ask(client)
        assert answer.status == 403 and b"suspended" in answer.body
        place.roster.resume("carla")
        assert carla.ask(client).status == 200
        place.roster.revoke("carla")
        assert carla.ask(client).status == 403


def test_seen_is_kept(place: Site, anna: Person, client: GatewayClient) -> None:
    anna.ask(client)
    known = place.roster.by_name("anna")
    assert known is not None and time.time() - known.seen < 3600


def test_renewal_gives_a_certificate_for_the_same_key(anna: Person, client: GatewayClient) -> None:
    found = client.renew()
    renewed = Person(
        anna.membership.with_certificate(found.certificate), anna.identity, anna.flower
    )
    assert found.certificate != anna.membership.certificate
    with renewed.client() as other:
        assert renewed.ask(other).status == 200


def test_rotation_keeps_name_and_flower_key(place: Site) -> None:
    dora = place.participant("dora")
    new = Identity(Ed25519PrivateKey.generate())
    with dora.client() as client:
        found = client.rotate(new)
        assert dora.ask(client).status == 403  # the old key is nobody's now
        again = client.rotate(new)  # as after an answer that was lost
    assert found.name == again.name == "dora"
    successor = Person(dora.membership.with_certificate(again.certificate), new, dora.flower)
    with successor.client() as client:
        assert successor.ask(client).status == 200
    with dora.client() as client, pytest.raises(GatewayError):
        client.rotate(Identity(Ed25519PrivateKey.generate()))


def test_a_rotation_needs_the_new_keys_word(place: Site, anna: Person) -> None:
    emma = place.participant("emma")
    new = Identity(Ed25519PrivateKey.generate())
    stranger = Identity(Ed25519PrivateKey.generate())
    proof = rotation_proof(stranger.public.public_bytes_raw(), new)  # for another old key
    with emma.client() as client, pytest.raises(GatewayError, match="does not hold"):
        csr = request_certificate(new).decode()
        client._call("POST", "/meadow/v1/renew", {"csr": csr, "proof": proof})


def test_another_version_is_told_so(anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meadow.client.gateway_client.__version__", "99.0.0")
    with anna.client() as client, pytest.raises(GatewayError, match="99.0.0") as caught:
        anna.ask(client)
    assert caught.value.status == 409 and "install" in caught.value.hint


def test_the_superlink_may_be_away(tmp_path: Path) -> None:
    with site(tmp_path) as place:
        anna = place.participant("anna")
        with anna.client() as client:
            assert anna.ask(client).status == 200
            place.run(place.superlink.stop())
            for path in (RUN, PULL):
                answer = anna.ask(client, path)
                assert answer.status == 503 and "meadow-refusal" in answer.headers


def test_a_renewed_server_certificate_is_taken_up(tmp_path: Path) -> None:
    """Old connections go on, new ones are shown the new one."""
    (tmp_path / "run.toml").write_text('[coordinator]\naddresses = ["127.0.0.1:1"]\n')
    with site(tmp_path) as place:
        anna = place.participant("anna")
        with anna.client() as client:
            assert anna.ask(client).status == 200
            shown = ssl.get_server_certificate(("127.0.0.1", place.gateway.port))
            (tmp_path / "authority" / "server.pem").unlink()
            place.run(_refreshed(place))
            renewed = ssl.get_server_certificate(("127.0.0.1", place.gateway.port))
            assert renewed != shown
            assert anna.ask(client).status == 200
        with anna.client() as client:
            assert anna.ask(client).status == 200


async def _refreshed(place: Site) -> None:
    place.gateway.refresh()


def test_it_ends_soon_when_it_is_asked_to(tmp_path: Path) -> None:
    """As a process, while a participant waits for messages."""
    with site(tmp_path) as place:
        anna = place.participant("anna")
        place.stop()
        command = [sys.executable, "-m", "meadow.server.gateway", "--folder", str(tmp_path)]
        command += ["--listen", place.address, "--superlink", f"127.0.0.1:{place.superlink.port}"]
        command += ["--superlink-authority", str(tmp_path / "authority.pem")]
        ready = tmp_path / "ready"
        command += ["--ready", str(ready)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not ready.exists() and process.poll() is None:
                time.sleep(0.02)
            assert ready.read_text() == str(place.gateway.port)
            with anna.client() as client:
                before = len(place.superlink.seen)
                answers: list[int] = []
                waiting = threading.Thread(
                    target=lambda: answers.append(anna.ask(client, PULL).status)
                )
                waiting.start()
                while len(place.superlink.seen) == before:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=20)
                waiting.join()
        assert process.returncode == 0 and answers == [200], said
        assert "Traceback" not in said


def test_an_address_that_is_taken_is_named(
    place: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--folder", str(tmp_path), "--listen", place.address]
    arguments += ["--superlink", "127.0.0.1:1", "--ready", str(tmp_path / "ready")]
    authority = str(place.folder / "authority.pem")
    with pytest.raises(SystemExit) as caught:
        gateway.main([*arguments, "--superlink-authority", authority])
    assert caught.value.code == 2 and f"cannot listen at {place.address}" in caplog.text
