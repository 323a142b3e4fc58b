"""Calling other peers: gRPC with mutual TLS.

A call is a verb and a body; the answer is bytes.  The peer that answers is the one whose
certificate is in the address book, or there is no answer.  Where a peer says that it is busy, the
caller waits as told, so that whoever produces too much is slowed down and nothing piles up.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from ..closeable import Closeable
from ..errors import PeerError
from .address_book import AddressBook, Contact
from .peer_limits import Clock, Counts, PeerLimits, Slots
from .peer_net import RETRY_AFTER, SERVICE, grpc, one_line, size_options
from .peer_tls import HOST_NAME, TlsCertificate, pem_of

_LONGEST_WAIT = 60.0  # seconds that a peer's word can keep us from calling it


@dataclass
class _Link:
    """The connection to one peer; gRPC opens, closes and reopens it as calls need it."""

    contact: Contact
    channel: grpc.Channel
    slots: Slots
    users: int = 0


class GrpcTransport(Closeable):
    """Calls other peers.  Threads may share it; a forked process must make its own."""

    def __init__(
        self,
        certificate: TlsCertificate,
        book: AddressBook,
        limits: PeerLimits | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.counts = Counts()
        """By peer: "answered", "sent" and "received" bytes, and each reason of a PeerError."""
        self._certificate = certificate
        self._book = book
        self._limits = limits or PeerLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._links: OrderedDict[bytes, _Link] = OrderedDict()  # least recently used first
        self._not_before: dict[bytes, float] = {}
        self._closed = threading.Event()
        self._process = os.getpid()

    def call(self, peer: bytes, verb: str, body: bytes) -> bytes:
        """The peer's answer.

        Waits where the peer is busy, and raises PeerError where there is no answer within the
        limits' seconds: it cannot be reached, shows another certificate, refuses or fails.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this transport belongs to another process: make one after the fork")
        deadline = self._clock() + self._limits.seconds
        try:
            answer = self._call(peer, verb, body, deadline)
        except _Failure as failure:
            self.counts.add(peer, failure.reason)
            raise failure.error(peer, self._book.find(peer)) from failure.__cause__
        self.counts.add(peer, "answered")
        self.counts.add(peer, "sent", len(body))
        self.counts.add(peer, "received", len(answer))
        return answer

    def close(self) -> None:
        """End all calls and connections; calls that wait or come later raise PeerError."""
        self._closed.set()
        with self._lock:
            links, self._links = list(self._links.values()), OrderedDict()
        for link in links:
            link.channel.close()

    def _call(self, peer: bytes, verb: str, body: bytes, deadline: float) -> bytes:
        if len(body) > self._limits.message:
            raise _too_large(f"{len(body)} bytes, at most {self._limits.message}")
        with self._link(peer) as link, link.slots.one(deadline - self._clock()) as free:
            if not free:
                raise _busy("all calls to it are still waiting for their answers")
            attempt = 0
            while True:
                self._wait(peer, deadline)
                try:
                    return self._attempt(link, verb, body, deadline)
                except grpc.RpcError as error:
                    self._not_before[peer] = self._clock() + _retry_after(error, attempt)
                    attempt += 1

    def _attempt(self, link: _Link, verb: str, body: bytes, deadline: float) -> bytes:
        """One try.  Lets only those errors of gRPC pass after which another try makes sense."""
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        try:
            method = link.channel.unary_unary(SERVICE + verb)
            return method(body, timeout=max(0.0, deadline - self._clock()))
        except grpc.RpcError as error:
            failure = _failure(error)
            if failure is None:
                raise
            raise failure from error
        except ValueError as error:  # gRPC's word for a channel that another thread closed
            raise _closed() from error

    def _wait(self, peer: bytes, deadline: float) -> None:
        """Until the peer wants to be called again."""
        seconds = self._not_before.get(peer, 0.0) - self._clock()
        if seconds > 0 and self._clock() + seconds > deadline:
            raise _busy(f"it asks for {seconds:.1f} more seconds")
        if self._closed.is_set() or (seconds > 0 and self._closed.wait(seconds)):
            raise _closed()

    @contextmanager
    def _link(self, peer: bytes) -> Iterator[_Link]:
        """The connection to a peer, which is not closed for another's sake during the block."""
        if peer == self._certificate.peer:
            raise _Failure("itself", "is this peer itself", "call others")
        contact = self._book.find(peer)
        if contact is None:
            raise _Failure("unknown", "is not in the address book", "it must be introduced first")
        if not contact.address:
            raise _Failure("no_address", "has no address", "it calls others; wait for its call")
        with self._lock:
            link = self._open(contact)
            link.users += 1
            self._trim()
        try:
            yield link
        finally:
            with self._lock:
                link.users -= 1

    def _open(self, contact: Contact) -> _Link:
        if self._closed.is_set():
            raise _closed()
        link = self._links.get(contact.peer)
        if link is None or link.contact != contact:
            if link is not None:
                link.channel.close()
            link = _Link(contact, self._channel(contact), Slots(self._limits.concurrent))
            self._links[contact.peer] = link
        self._links.move_to_end(contact.peer)
        return link

    def _trim(self) -> None:
        """Close what was used least recently and is not in use now."""
        idle = [peer for peer, link in self._links.items() if not link.users]
        for peer in idle[: max(0, len(self._links) - self._limits.channels)]:
            self._links.pop(peer).channel.close()

    def _channel(self, contact: Contact) -> grpc.Channel:
        """A connection that trusts the one certificate of this peer."""
        credentials = grpc.ssl_channel_credentials(
            contact.certificate, self._certificate.key_pem, pem_of(self._certificate.der)
        )
        options = [
            ("grpc.ssl_target_name_override", HOST_NAME),
            ("grpc.use_local_subchannel_pool", 1),  # no connection with another's credentials
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config_disable_resolution", 1),  # asks name servers for nothing else
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 20_000),  # how long one attempt may take
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.keepalive_time_ms", 30_000),  # and a dead line is noticed by TCP
            ("grpc.client_idle_timeout_ms", 60_000),
            *size_options(self._limits),
        ]
        return grpc.secure_channel(f"dns:///{contact.address}", credentials, options)


class _Failure(Exception):
    """Why a call has no answer, before the error that its caller sees."""

    def __init__(self, reason: str, text: str, hint: str) -> None:
        super().__init__(text)
        self.reason, self.text, self.hint = reason, text, hint

    def error(self, peer: bytes, contact: Contact | None) -> PeerError:
        where = f" at {contact.address}" if contact and contact.address else ""
        return PeerError(f"peer {peer.hex()[:16]}{where} {self.text}", self.hint)


def _busy(text: str) -> _Failure:
    return _Failure("busy", f"is busy: {text}", "call it later, or less often")


def _closed() -> _Failure:
    return _Failure("closed", "was not called to the end: this peer is stopping", "")


def _too_large(text: str) -> _Failure:
    return _Failure("too_large", f"cannot be sent or send so much: {text}", "ask for fewer records")


def _failure(error: grpc.RpcError) -> _Failure | None:
    """What an error of gRPC means for the caller; None if the peer wants us to come again."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _too_large(one_line(details)) if "larger than max" in details else None
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _Failure("timeout", "gave no answer in time", "it will be asked again")
    if code is grpc.StatusCode.CANCELLED:
        return _closed()
    refusals = (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
    if code in refusals:
        text, hint = f"refuses: {one_line(details)}", "see whether both run the same meadow"
        return _Failure("refused", text, hint)
    return _Failure("failed", f"failed: {one_line(details) or code.name}", "its own log says why")


def _unavailable(details: str) -> _Failure:
    """gRPC has one code for these three; only its words tell them apart."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        text = "is somebody else: the certificate there is not the one in the address book"
        return _Failure("wrong_certificate", text, "it moved, or another peer listens there now")
    if "Socket closed" in details or "Connection reset" in details:
        text = "closed the connection"
        return _Failure("closed_by_peer", text, "it is stopping, or does not know this peer yet")
    return _Failure("unreachable", "cannot be reached", "it will be tried again when it is up")


def _retry_after(error: grpc.RpcError, attempt: int) -> float:
    """Seconds: what the peer asks for, or an own guess that doubles; never absurdly long."""
    for key, said in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == RETRY_AFTER and isinstance(said, str) and re.fullmatch("[0-9]{1,9}", said):
            return min(int(said) / 1000, _LONGEST_WAIT)
    return min(0.05 * 2.0 ** min(attempt, 20) * random.uniform(0.5, 1.0), _LONGEST_WAIT)
