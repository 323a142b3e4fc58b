"""A caller gets an answer from the right peer, or one clear line; and it waits when told to."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from loopback_peers import Node, answers, echo, eventually, identity, running

from meadow.client import peer_server
from meadow.client.address_book import AddressBook
from meadow.client.peer_limits import PeerLimits
from meadow.client.peer_tls import certificate_of
from meadow.client.peer_transport import GrpcTransport
from meadow.errors import PeerError

QUICK = PeerLimits(message=1000, seconds=0.5, concurrent=2)


class Gate:
    """A handler that holds every request until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside: list[bytes] = []

    def __call__(self, caller: bytes, verb: str, body: bytes) -> bytes:
        self.inside.append(body)
        assert self.open.wait(20.0)
        return b"done"


def reason(caller: Node, called: bytes, body: bytes = b"") -> str:
    """Why a call fails."""
    before = caller.transport.counts.of(called)
    with pytest.raises(PeerError) as caught:
        caller.transport.call(called, "pull", body)
    assert called.hex()[:16] in str(caught.value) and "\n" not in str(caught.value)
    after = caller.transport.counts.of(called)
    (changed,) = [what for what in after if after[what] != before.get(what, 0)]
    return changed


def test_who_cannot_be_called_at_all() -> None:
    with running(ada := Node(1)):
        stranger, quiet = certificate_of(identity(7)), certificate_of(identity(8))
        ada.book.put(quiet.peer, quiet.der, "")
        assert reason(ada, stranger.peer) == "unknown"
        assert reason(ada, quiet.peer) == "no_address"
        assert reason(ada, ada.peer) == "itself"


def test_a_peer_that_is_down_and_one_that_came_back() -> None:
    with running(ada := Node(1), bob := Node(2)):
        assert answers(ada, bob)
        bob.server.stop()
        assert reason(ada, bob.peer) in ("unreachable", "closed_by_peer")
        assert reason(ada, bob.peer) == "unreachable"
        bob.server.start(bob.address)
        eventually(lambda: answers(ada, bob))


def test_another_peer_at_the_address_is_noticed() -> None:
    with running(ada := Node(1), bob := Node(2), eve := Node(9)):
        ada.book.put(bob.peer, bob.certificate.der, eve.address)
        assert reason(ada, bob.peer) == "wrong_certificate"
        assert eve.server.counts.of(ada.peer) == {}


def test_a_peer_that_moves_is_found_again() -> None:
    with running(ada := Node(1), bob := Node(2)):
        assert answers(ada, bob)
        bob.server.stop()
        bob.address = bob.server.start("127.0.0.1:0")
        ada.knows(bob)
        eventually(lambda: answers(ada, bob))


def test_too_much_is_not_even_sent() -> None:
    with running(ada := Node(1, limits=QUICK), bob := Node(2)):
        assert reason(ada, bob.peer, bytes(1001)) == "too_large"
        assert bob.server.counts.of(ada.peer) == {}


def test_too_much_is_not_taken() -> None:
    big = Node(2, handler=lambda caller, verb, body: bytes(1001))
    with running(ada := Node(1, limits=QUICK), big):
        assert reason(ada, big.peer) == "too_large"


def test_no_answer_in_time() -> None:
    gate = Gate()
    with running(ada := Node(1, limits=QUICK), bob := Node(2, gate)):
        assert reason(ada, bob.peer) == "timeout"
        gate.open.set()
        assert ada.transport.call(bob.peer, "pull", b"") == b"done"


def test_calls_to_one_peer_wait_for_each_other() -> None:
    """Back-pressure: no more than the limit is under way, and the rest waits in its callers."""
    gate, limits = Gate(), PeerLimits(concurrent=2)
    ada, bob = Node(1, limits=limits), Node(2, gate, PeerLimits(concurrent=9))
    with running(ada, bob), ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(ada.transport.call, bob.peer, "pull", b"") for _ in range(6)]
        try:
            eventually(lambda: len(gate.inside) == 2)
            assert not any(call.done() for call in calls) and len(gate.inside) == 2
        finally:
            gate.open.set()
        assert [call.result() for call in calls] == [b"done"] * 6


def test_who_waits_too_long_for_the_others_gives_up() -> None:
    gate = Gate()
    with running(ada := Node(1, limits=replace(QUICK, concurrent=1)), bob := Node(2, gate)):
        gate.open.set()
        with ada.transport._link(bob.peer) as link, link.slots.one(0.0) as taken:
            assert taken and reason(ada, bob.peer) == "busy"
            assert gate.inside == []  # the other side has heard of nothing
        assert ada.transport.call(bob.peer, "pull", b"") == b"done"


def test_a_limited_caller_waits_as_told_and_loses_nothing() -> None:
    """The flood becomes a stream at the rate that the other side takes."""
    limits = PeerLimits(requests_per_second=20.0, request_burst=2.0)
    with running(ada := Node(1), bob := Node(2, limits=limits)):
        for number in range(8):
            body = b"%d" % number
            assert ada.transport.call(bob.peer, "pull", body) == echo(ada.peer, "pull", body)
        counts = bob.server.counts.of(ada.peer)
        assert counts["answered"] == 8
        assert 1 <= counts["limited"] <= 8  # asked about once too early, not again and again


def test_a_wait_beyond_the_deadline_is_an_error_at_once() -> None:
    limits = PeerLimits(requests_per_second=0.01, request_burst=1.0)
    with running(ada := Node(1), bob := Node(2, limits=limits)):
        assert answers(ada, bob)
        for _ in range(5):
            assert reason(ada, bob.peer) == "busy"
        assert bob.server.counts.of(ada.peer)["limited"] == 1  # the network saw it once


class Turning(peer_server.PeerServer):
    """Turns everybody away `times` times, with what it likes as the time to come back."""

    said: str
    times: int

    def _serve(self, verb: str, requests: object, context: grpc.ServicerContext) -> bytes:
        self.times -= 1
        if self.times >= 0:
            context.set_trailing_metadata((("retry-after-ms", self.said),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not now")
        return b"now"


def turning(said: str, times: int, limits: PeerLimits | None = None) -> tuple[Node, Node]:
    ada, bob = Node(1, limits=limits or PeerLimits()), Node(2)
    bob.server.stop()
    bob.server = server = Turning(bob.certificate, bob.book, echo)
    server.said, server.times = said, times
    bob.address = server.start(bob.address)
    return ada, bob


@pytest.mark.parametrize("said", ["", "soon", "-5", "1e9", "0", "9" * 30])
def test_nonsense_is_answered_by_an_own_back_off(said: str) -> None:
    ada, bob = turning(said, 3)
    with running(ada, bob):
        assert ada.transport.call(bob.peer, "pull", b"") == b"now"


def test_a_peer_that_says_never_is_called_again_after_a_while() -> None:
    ada, bob = turning("999999999", 1)
    with running(ada, bob):
        with pytest.raises(PeerError, match=r"is busy: it asks for (60.0|59.\d) more seconds"):
            ada.transport.call(bob.peer, "pull", b"")


def test_a_peer_that_never_has_time_ends_in_an_error() -> None:
    ada, bob = turning("10", 10**9, replace(QUICK, seconds=0.3))
    with running(ada, bob):
        assert reason(ada, bob.peer) in ("busy", "timeout")


def test_only_so_many_connections_stay_open() -> None:
    """The least recently used go; who is called again is connected again."""
    ada = Node(1, limits=PeerLimits(channels=2))
    others = [Node(n) for n in (2, 3, 4)]
    with running(ada, *others):
        for _ in range(2):
            for other in others:
                assert ada.transport.call(other.peer, "pull", b"")
                assert len(ada.transport._links) <= 2
        assert list(ada.transport._links) == [other.peer for other in others[1:]]


def test_a_connection_in_use_is_not_closed_for_another() -> None:
    gate = Gate()
    ada, bob, eve = Node(1, limits=PeerLimits(channels=1)), Node(2, gate), Node(9)
    with running(ada, bob, eve), ThreadPoolExecutor(1) as threads:
        call = threads.submit(ada.transport.call, bob.peer, "pull", b"")
        eventually(lambda: len(gate.inside) == 1)
        assert ada.transport.call(eve.peer, "pull", b"")
        gate.open.set()
        assert call.result() == b"done"


def test_closing_ends_calls_and_waits() -> None:
    gate = Gate()
    limits = PeerLimits(requests_per_second=0.2, request_burst=1.0)
    ada, bob, slow = Node(1), Node(2, limits=limits), Node(3, gate)
    with running(ada, bob, slow), ThreadPoolExecutor(2) as threads:
        assert answers(ada, bob)
        waiting = threads.submit(ada.transport.call, bob.peer, "pull", b"")
        running_ = threads.submit(ada.transport.call, slow.peer, "pull", b"")
        eventually(lambda: bob.server.counts.of(ada.peer).get("limited") == 1)
        eventually(lambda: len(gate.inside) == 1)
        ada.transport.close()
        for call in (waiting, running_):
            assert "this peer is stopping" in str(call.exception(10.0))
        assert reason(ada, bob.peer) == "closed"
        gate.open.set()


def test_a_forked_process_is_told_to_make_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcTransport(certificate_of(identity(1)), AddressBook()) as transport:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RuntimeError, match="after the fork"):
            transport.call(bytes(32), "pull", b"")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(proxy := Node(5)):
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        with running(ada := Node(1), bob := Node(2)):
            assert ada.transport.call(bob.peer, "pull", b"")
