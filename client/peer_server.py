"""Answering other peers: gRPC with mutual TLS and limits.

Nobody connects whose certificate is not in the address book, which may grow while this serves.  A
caller's name is the one that its certificate proves, never one that it sends.  What the bytes mean
is the handler's.

A caller is judged before its request's body is read, and one that asks for too much is told when
to come back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import cast

from ..address import split_address
from ..errors import MeadowError, PeerError
from .address_book import AddressBook
from .peer_limits import Allowance, Clock, Counts, PeerLimits
from .peer_net import LONGEST_CALL, RETRY_AFTER, SERVICE, grpc, one_line, size_options
from .peer_tls import TlsCertificate, pem_of
from .verbs import Verbs

Handler = Callable[[bytes, str, bytes], bytes]
"""Calling peer's key, verb, body -> answer.  Its MeadowErrors are told to the caller."""

_VERB = "[a-z][a-z_]{0,31}"
_TRAFFIC = ("answered", "received", "sent")  # in counts: what is no reason of a refusal
_STRANGER = b""  # in counts: who is not, or no longer, in the address book

_log = logging.getLogger(__name__)


class PeerServer:
    """Answers the calls of members.  `start` it, and `stop` it in the end."""

    def __init__(
        self,
        certificate: TlsCertificate,
        book: AddressBook,
        handler: Handler,
        limits: PeerLimits | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.counts = Counts()
        """By caller: "answered", "received" and "sent" bytes, and each reason of a refusal."""
        self._certificate = certificate
        self._book = book
        self._handler = handler
        self._limits = limits or PeerLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._allowances: dict[bytes, Allowance] = {}  # of members only: the book bounds it
        self._served_version = -1
        self._server: grpc.Server | None = None
        self._workers: ThreadPoolExecutor | None = None

    def refusals(self) -> dict[tuple[str, bytes], int]:
        """How often a call was refused, by reason and caller."""
        counted = self.counts.all().items()
        return {(f"call {what}", who): n for (what, who), n in counted if what not in _TRAFFIC}

    def start(self, address: str) -> str:
        """Listen at host:port, where port 0 means any free one; the address that it became.

        Raises PeerError if the address cannot be had, FormatError if it is not one.
        """
        if self._server is not None:
            raise RuntimeError("this server was started already")
        split_address(address, least_port=0)
        workers = ThreadPoolExecutor(self._limits.workers, "meadow-peer")
        server = self._make(workers)
        try:
            port = server.add_secure_port(address, self._credentials())
        except RuntimeError as error:
            workers.shutdown()
            hint = "another program uses it, or it is not this machine's"
            raise PeerError(f"cannot listen at {address}", hint) from error
        server.start()
        self._server, self._workers = server, workers
        return f"{address.rpartition(':')[0]}:{port}"

    def stop(self, grace: float = 5.0) -> None:
        """Accept nothing more, let calls in progress end within `grace` seconds, then cut them.

        On return no handler runs any more.
        """
        if self._server is not None and self._workers is not None:
            self._server.stop(grace).wait()
            self._workers.shutdown()
            self._server = self._workers = None

    def _make(self, workers: ThreadPoolExecutor) -> grpc.Server:
        limits = self._limits
        options = [
            ("grpc.so_reuseport", 0),  # two peers at one port would take turns, unnoticed
            ("grpc.max_concurrent_streams", limits.concurrent),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            *size_options(limits),
        ]
        most = limits.workers + limits.waiting
        verbs = Verbs(SERVICE, _VERB, self._method)
        return grpc.server(workers, [verbs], options=options, maximum_concurrent_rpcs=most)

    def _credentials(self) -> grpc.ServerCredentials:
        """TLS that asks for the newest book at every handshake."""
        self._served_version = -1
        first = self._newer()
        assert first is not None  # no version is negative
        newer = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._newer)  # or None
        return grpc.dynamic_ssl_server_credentials(first, newer, True)

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Whom to accept, if that has changed since gRPC asked last."""
        with self._lock:
            if self._book.version == self._served_version:
                return None
            self._served_version, certificates = self._book.certificates()
        own = pem_of(self._certificate.der)
        return grpc.ssl_server_certificate_configuration(
            [(self._certificate.key_pem, own)], own + certificates
        )

    def _method(self, verb: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Takes a stream of requests, so that a caller is judged before gRPC has read what it
        sends."""
        return grpc.stream_unary_rpc_method_handler(partial(self._serve, verb))

    def _serve(self, verb: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """One call, on a worker's thread."""
        caller = _STRANGER
        try:
            caller = self._caller(context)
            self._require_manners(caller, context)
            with self._admitted(caller) as moved:
                return self._answer(caller, verb, requests, context, moved)
        except _Refusal as refusal:
            self.counts.add(caller, refusal.reason)
            if refusal.wait:
                wait = str(max(1, round(refusal.wait * 1000)))
                context.set_trailing_metadata(((RETRY_AFTER, wait),))
            context.abort(refusal.code, refusal.text)

    def _caller(self, context: grpc.ServicerContext) -> bytes:
        """The key of the member that holds the other end of this connection."""
        proof = cast("Mapping[str, Sequence[bytes]]", context.auth_context())
        if proof.get("ssl_tls_version", [b"TLSv1.3"]) != [b"TLSv1.3"]:  # older gRPC does not say
            raise _unauthenticated("old_tls", "only TLS 1.3 is spoken here")
        owner = self._book.owner(proof["x509_pem_cert"][0])
        if owner is None:
            raise _unauthenticated("unknown", "this certificate is no member's")
        return owner

    def _require_manners(self, caller: bytes, context: grpc.ServicerContext) -> None:
        """A name that is not this peer's own, and a deadline: so that a caller that sends slowly,
        or nothing, holds its worker for a limited time."""
        if caller == self._certificate.peer:
            raise _unauthenticated("own_key", "this is my own key: two must not share one")
        remaining = context.time_remaining()
        if remaining is None or remaining > LONGEST_CALL:
            text = f"a call needs a deadline of at most {LONGEST_CALL:.0f} seconds"
            raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no_deadline", text)

    @contextmanager
    def _admitted(self, caller: bytes) -> Iterator[list[int]]:
        """A place for one request of the caller; the block appends the sizes that it moved."""
        with self._lock:
            if caller not in self._allowances:
                self._allowances[caller] = Allowance(self._limits, self._clock)
            allowance = self._allowances[caller]
        wait = allowance.enter()
        if wait:
            text = "more requests or bytes than this peer takes"
            raise _Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "limited", text, wait)
        moved: list[int] = []
        try:
            yield moved
        finally:
            allowance.leave(sum(moved))

    def _answer(
        self,
        caller: bytes,
        verb: str,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        moved: list[int],
    ) -> bytes:
        body = self._body(requests, context)
        moved.append(len(body))
        self.counts.add(caller, "received", len(body))
        answer = self._handled(caller, verb, body)
        moved.append(len(answer))
        self.counts.add(caller, "sent", len(answer))
        self.counts.add(caller, "answered")
        return answer

    def _body(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The one message of a request."""
        try:
            body = next(requests, None)
            more = body is not None and next(requests, None) is not None
        except grpc.RpcError as error:
            raise _Refusal(grpc.StatusCode.CANCELLED, "broken_off", "broken off") from error
        if body is None:  # cut off, too slow or too large; gRPC has two ways to say so
            raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, "broken_off", "no message came")
        if more:
            text = "a request has exactly one message"
            raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, "malformed", text)
        return body

    def _handled(self, caller: bytes, verb: str, body: bytes) -> bytes:
        try:
            answer = self._handler(caller, verb, body)
        except MeadowError as error:
            text = one_line(str(error))
            raise _Refusal(grpc.StatusCode.INVALID_ARGUMENT, "refused", text) from error
        except Exception as error:
            _log.exception("%r of peer %s met a defect", verb, caller.hex()[:16])
            raise _Refusal(grpc.StatusCode.INTERNAL, "defect", "met a defect") from error
        if len(answer) > self._limits.message:
            _log.error("the answer to %r has %d bytes, more than the limit", verb, len(answer))
            raise _Refusal(grpc.StatusCode.INTERNAL, "defect", "its answer is too large to send")
        return answer


class _Refusal(Exception):
    """A call that gets no answer, and what its caller is told."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.code, self.reason, self.text, self.wait = code, reason, text, wait


def _unauthenticated(reason: str, text: str) -> _Refusal:
    return _Refusal(grpc.StatusCode.UNAUTHENTICATED, reason, text)
