"""Who may call, and how much: over real sockets, with callers that keep to no rules."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from loopback_peers import ANYWHERE, Node, answers, echo, eventually, raw_channel, running

from meadow.client.peer_limits import PeerLimits
from meadow.client.peer_server import PeerServer
from meadow.client.peer_tls import TlsCertificate, pem_of
from meadow.errors import FormatError, PeerError, UpdateError

SMALL = PeerLimits(message=1000, concurrent=2, workers=4, waiting=4)


def unary(channel: grpc.Channel, path: str = "pull") -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(path if "/" in path else f"/meadow.Peer/{path}")


def stream(channel: grpc.Channel) -> grpc.StreamUnaryMultiCallable[bytes, bytes]:
    return channel.stream_unary("/meadow.Peer/pull")


def shout(
    channel: grpc.Channel,
    body: bytes = b"",
    timeout: float | None = 5.0,
    compression: grpc.Compression = grpc.Compression.NoCompression,
) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """A call that is expected to fail: code, details and trailing metadata."""
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel)(body, timeout=timeout, compression=compression)
    metadata = cast("Iterable[tuple[str, str]]", caught.value.trailing_metadata() or ())
    return caught.value.code(), caught.value.details() or "", dict(metadata)


# Who may call


def test_three_peers_call_each_other() -> None:
    nodes = [Node(n) for n in (1, 2, 3)]
    with running(*nodes):
        for caller in nodes:
            for called in nodes:
                if caller is not called:
                    answer = caller.transport.call(called.peer, "pull", b"\0body\xff")
                    assert answer == caller.peer.hex().encode() + b" pull \0body\xff"
        counts = nodes[0].server.counts.of(nodes[1].peer)
        assert counts == {"answered": 1, "received": 6, "sent": 64 + 6 + 6}
        assert nodes[1].transport.counts.of(nodes[0].peer) == {
            "answered": 1, "sent": 6, "received": 64 + 6 + 6,
        }  # fmt: skip


def test_a_stranger_cannot_connect() -> None:
    ada, eve = Node(1), Node(9)
    with running(ada, eve, acquainted=False):
        eve.knows(ada)
        with pytest.raises(PeerError, match="closed the connection .*does not know this peer"):
            eve.transport.call(ada.peer, "pull", b"")
        assert eve.transport.counts.of(ada.peer) == {"closed_by_peer": 1}
        assert ada.server.counts.of(eve.peer) == {}


def test_without_a_certificate_nobody_connects() -> None:
    ada = Node(1)
    with running(ada):
        credentials = grpc.ssl_channel_credentials(pem_of(ada.certificate.der))
        options = [("grpc.ssl_target_name_override", "meadow.peer")]
        for channel in (
            grpc.secure_channel(ada.address, credentials, options),
            grpc.insecure_channel(ada.address),
        ):
            with channel:
                assert shout(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_member_is_added_while_the_server_runs() -> None:
    ada, bob, eve = Node(1), Node(2), Node(9)
    with running(ada, bob), running(eve, acquainted=False):
        running_calls = bob.transport.call(ada.peer, "pull", b"before")
        eve.knows(ada)
        with pytest.raises(PeerError):
            eve.transport.call(ada.peer, "pull", b"")
        ada.knows(eve)
        eventually(lambda: answers(eve, ada))
        assert bob.transport.call(ada.peer, "pull", b"before") == running_calls


def issued(by: TlsCertificate, like: TlsCertificate) -> TlsCertificate:
    """A certificate in the name of `like` that the member `by` signs with its TLS key."""
    key, issuer_key = (
        ec.generate_private_key(ec.SECP256R1()),
        load_pem_private_key(by.key_pem, None),
    )
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    model, issuer = (x509.load_der_x509_certificate(c.der) for c in (like, by))
    builder = x509.CertificateBuilder(
        issuer.subject,
        model.subject,
        key.public_key(),
        7,
        datetime.datetime(1970, 1, 1),
        datetime.datetime(9999, 1, 1),
    )
    for extension in model.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    der = builder.sign(issuer_key, SHA256()).public_bytes(Encoding.DER)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsCertificate(like.peer, der, pem)


def test_a_member_cannot_issue_certificates_in_another_s_name() -> None:
    ada, bob, eve = Node(1), Node(2), Node(9)
    with running(ada, bob, eve):
        false = issued(by=eve.certificate, like=bob.certificate)
        chain = pem_of(eve.certificate.der)
        for more in (b"", chain):
            with raw_channel(false, ada, more) as channel:
                assert shout(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_copied_certificate_is_worth_nothing_without_its_key() -> None:
    ada, bob, eve = Node(1), Node(2), Node(9)
    with running(ada, bob, acquainted=True), running(eve, acquainted=False):
        claim = replace(bob.certificate, key_pem=eve.certificate.key_pem)
        with raw_channel(claim, ada) as channel:
            assert shout(channel)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_was_replaced_ends_at_the_next_call() -> None:
    """The connection outlives its entry; the entry is what counts."""
    ada, bob = Node(1), Node(2)
    with running(ada, bob):
        assert bob.transport.call(ada.peer, "pull", b"")
        with ada.book._lock:
            ada.book._owners.clear()
        with pytest.raises(PeerError, match="refuses: this certificate is no member's"):
            bob.transport.call(ada.peer, "pull", b"")
        assert ada.server.counts.of(b"") == {"unknown": 1}


def test_nobody_calls_in_this_peer_s_own_name() -> None:
    with running(ada := Node(1)), raw_channel(ada.certificate, ada) as channel:
        code, details, _ = shout(channel)
        assert code is grpc.StatusCode.UNAUTHENTICATED and "two must not share" in details
        assert ada.server.counts.of(ada.peer) == {"own_key": 1}


def test_tls_1_3_is_spoken() -> None:
    seen: list[object] = []

    class Spy(PeerServer):
        def _caller(self, context: grpc.ServicerContext) -> bytes:
            seen.append(context.auth_context()["ssl_tls_version"])
            return super()._caller(context)

    ada, bob = Node(1), Node(2)
    ada.server.stop()
    ada.server = Spy(ada.certificate, ada.book, echo)
    ada.address = ada.server.start(ANYWHERE)
    with running(ada, bob):
        bob.transport.call(ada.peer, "pull", b"")
        assert seen == [[b"TLSv1.3"]]


# How much


def test_a_request_that_is_too_large() -> None:
    ada, bob = Node(1, limits=SMALL), Node(2)
    with running(ada, bob):
        assert bob.transport.call(ada.peer, "pull", bytes(1000 - 6 - 64))
        with pytest.raises(PeerError, match="so much.*larger than max"):
            bob.transport.call(ada.peer, "pull", bytes(1001))
        assert bob.transport.counts.of(ada.peer)["too_large"] == 1
        assert bob.transport.call(ada.peer, "pull", b"")


def test_an_answer_that_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    ada = Node(1, handler=lambda caller, verb, body: bytes(int(body)), limits=SMALL)
    with running(ada, bob := Node(2)):
        assert len(bob.transport.call(ada.peer, "pull", b"1000")) == 1000
        with pytest.raises(PeerError, match="failed: its answer is too large to send"):
            bob.transport.call(ada.peer, "pull", b"1001")
        assert "the answer to 'pull' has 1001 bytes" in caplog.text


def test_a_message_that_unpacks_to_more_is_refused() -> None:
    seen: list[int] = []

    def measure(caller: bytes, verb: str, body: bytes) -> bytes:
        seen.append(len(body))
        return b""

    with running(ada := Node(1, measure, SMALL), bob := Node(2)):
        with raw_channel(bob.certificate, ada) as channel:
            code, *_ = shout(channel, bytes(10**6), compression=grpc.Compression.Gzip)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert seen == []


def test_a_flood_is_told_when_to_come_back_and_others_are_served() -> None:
    limits = replace(SMALL, requests_per_second=0.5, request_burst=3.0)
    ada, bob, eve = Node(1, limits=limits), Node(2), Node(9)
    with running(ada, bob, eve), raw_channel(eve.certificate, ada) as channel:
        method = unary(channel)
        for _ in range(3):
            assert method(b"", timeout=5.0)
        for _ in range(20):
            code, details, metadata = shout(channel)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "more requests" in details
            assert 0 < int(metadata["retry-after-ms"]) <= 2000
        assert ada.server.counts.of(eve.peer)["limited"] == 20
        for _ in range(3):
            assert bob.transport.call(ada.peer, "pull", b"")


def test_bytes_are_limited_as_requests_are() -> None:
    limits = replace(SMALL, bytes_per_second=100.0, byte_burst=1000.0)
    ada, eve = Node(1, lambda caller, verb, body: bytes(900), limits), Node(9)
    with running(ada, eve), raw_channel(eve.certificate, ada) as channel:
        method = unary(channel)
        assert len(method(bytes(500), timeout=5.0)) == 900
        code, _, metadata = shout(channel)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 2000 < int(metadata["retry-after-ms"]) <= 4000  # 400 bytes of debt


class Gate:
    """A handler that holds every request until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside: list[bytes] = []

    def __call__(self, caller: bytes, verb: str, body: bytes) -> bytes:
        self.inside.append(caller)
        assert self.open.wait(20.0)
        return b"done"


def test_one_peer_s_slow_requests_leave_room_for_others() -> None:
    gate = Gate()
    ada, bob, eve = Node(1, gate, SMALL), Node(2), Node(9)
    with running(ada, bob, eve), ThreadPoolExecutor(8) as threads:
        channels = [raw_channel(eve.certificate, ada) for _ in range(6)]
        futures = [unary(c).future(b"", timeout=15) for c in channels]
        try:
            eventually(lambda: sum(f.done() for f in futures) == 4)  # of six, two are let in
            refused = [f for f in futures if f.done()]
            assert {f.code() for f in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert gate.inside == [eve.peer] * 2
            answer = threads.submit(bob.transport.call, ada.peer, "pull", b"")
            eventually(lambda: bob.peer in gate.inside)
        finally:
            gate.open.set()
        assert answer.result() == b"done"
        assert [f.result() for f in futures if f not in refused] == [b"done"] * 2
        for channel in channels:
            channel.close()


def test_more_calls_than_workers_and_queue_are_turned_away_at_once() -> None:
    gate = Gate()
    limits = PeerLimits(workers=2, waiting=1, concurrent=8)
    ada, eve = Node(1, gate, limits), Node(9)
    with running(ada, eve), raw_channel(eve.certificate, ada) as channel:
        method = unary(channel)
        futures = [method.future(b"", timeout=15) for _ in range(8)]
        try:
            eventually(lambda: sum(f.done() for f in futures) == 5)
        finally:
            gate.open.set()
        assert sum(f.code() is grpc.StatusCode.OK for f in futures) == 3


def endless(parts: list[bytes], hold: threading.Event) -> Iterator[bytes]:
    yield from parts
    hold.wait(20.0)


def test_who_sends_nothing_is_cut_off_at_its_deadline_and_holds_no_place() -> None:
    ada, bob, eve = Node(1, limits=SMALL), Node(2), Node(9)
    hold = threading.Event()
    with running(ada, bob, eve), raw_channel(eve.certificate, ada) as channel:
        method = stream(channel)
        slow = [method.future(endless([], hold), timeout=0.5) for _ in range(2)]
        assert bob.transport.call(ada.peer, "pull", b"")
        try:
            for future in slow:
                with pytest.raises(grpc.RpcError):
                    future.result()
            eventually(lambda: ada.server.counts.of(eve.peer).get("broken_off", 0) == 2)
        finally:
            hold.set()
        assert unary(channel)(b"", timeout=5.0)


@pytest.mark.parametrize("timeout", [None, 3600.0])
def test_a_call_that_could_last_for_ever_is_refused(timeout: float | None) -> None:
    with running(ada := Node(1), eve := Node(9)), raw_channel(eve.certificate, ada) as channel:
        code, details, _ = shout(channel, timeout=timeout)
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "at most 60 seconds" in details
        assert ada.server.counts.of(eve.peer) == {"no_deadline": 1}


@pytest.mark.parametrize(
    ("messages", "says", "reason"),
    [([], "no message", "broken_off"), ([b"a", b"b"], "exactly one message", "malformed")],
)
def test_a_request_is_one_message(messages: list[bytes], says: str, reason: str) -> None:
    with running(ada := Node(1), eve := Node(9)), raw_channel(eve.certificate, ada) as channel:
        with pytest.raises(grpc.RpcError, match=says):
            stream(channel)(iter(messages), timeout=5.0)
        assert ada.server.counts.of(eve.peer) == {reason: 1}


@pytest.mark.parametrize(
    "path", ["/meadow.Peer/", "/meadow.Peer/A", "/other/x", "/meadow.Peer/x/y"]
)
def test_what_is_no_verb_is_unknown(path: str) -> None:
    with running(ada := Node(1), eve := Node(9)), raw_channel(eve.certificate, ada) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, path)(b"", timeout=5.0)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# Faults


def test_a_handler_s_refusal_is_told_and_a_defect_is_not(caplog: pytest.LogCaptureFixture) -> None:
    def fussy(caller: bytes, verb: str, body: bytes) -> bytes:
        if verb == "bad":
            raise UpdateError("record 7 is\nout of range " + "x" * 500, "drop it")
        raise KeyError("secret")

    with running(ada := Node(1, fussy), bob := Node(2)):
        with pytest.raises(PeerError, match=r"refuses: record 7 is out of range x+\.\.\. \("):
            bob.transport.call(ada.peer, "bad", b"")
        assert caplog.text == ""
        with pytest.raises(PeerError, match="met a defect") as caught:
            bob.transport.call(ada.peer, "worse", b"")
        assert "secret" not in str(caught.value)
        assert "KeyError: 'secret'" in caplog.text
        assert ada.server.counts.of(bob.peer) == {"refused": 1, "defect": 1, "received": 0}


def test_garbage_and_silence_on_the_port_harm_nobody() -> None:
    with running(ada := Node(1), bob := Node(2)):
        host, _, port = ada.address.rpartition(":")
        silent = socket.create_connection((host, int(port)))
        with socket.create_connection((host, int(port))) as noisy:
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
        assert bob.transport.call(ada.peer, "pull", b"")
        silent.close()


def test_a_port_that_is_taken_or_foreign_is_refused() -> None:
    with running(ada := Node(1)):
        for address in (ada.address, "192.0.2.1:0"):
            with pytest.raises(PeerError, match="cannot listen at"):
                Node(2, address=address)
    with pytest.raises(FormatError, match="host:port"):
        Node(2, address="unix:/run/x")


def test_a_server_starts_again_where_it_was() -> None:
    with running(ada := Node(1), bob := Node(2)):
        assert bob.transport.call(ada.peer, "pull", b"")
        for _ in range(2):
            ada.server.stop()
            with pytest.raises(PeerError):
                bob.transport.call(ada.peer, "pull", b"")
            assert ada.server.start(ada.address) == ada.address
            with pytest.raises(RuntimeError, match="started already"):
                ada.server.start(ada.address)
            eventually(lambda: answers(bob, ada))


def test_stopping_lets_calls_end_and_takes_no_more() -> None:
    gate = Gate()
    ada, bob = Node(1, gate), Node(2, limits=PeerLimits(seconds=60.0))
    eve = Node(3, limits=PeerLimits(seconds=0.5))

    def turned_away() -> bool:
        inside = len(gate.inside)  # where it waits who asks while ada is about to stop
        return not answers(eve, ada) and len(gate.inside) == inside

    with running(ada, bob, eve), ThreadPoolExecutor(3) as threads:
        call = threads.submit(bob.transport.call, ada.peer, "pull", b"")
        eventually(lambda: len(gate.inside) == 1)
        stopping = threads.submit(ada.server.stop, 60.0)
        eventually(turned_away)
        assert turned_away() and not call.done()
        gate.open.set()
        stopping.result()
        assert call.result() == b"done"
        ada.server.stop()


def test_users_see_no_lines_of_grpc() -> None:
    """A stranger's attempts are nothing that a peer's user should read about in C++."""
    code = (
        "from loopback_peers import *\n"
        "ada, eve = Node(1), Node(9)\n"
        "with running(ada, eve, acquainted=False):\n"
        "    eve.knows(ada)\n"
        "    try: eve.transport.call(ada.peer, 'pull', b'')\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({helpers!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("PeerError\n", "")
