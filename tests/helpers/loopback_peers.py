"""Peers on real loopback sockets, whose identities are made from small numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

from meadow.client.address_book import AddressBook  # noqa: E402
from meadow.client.peer_limits import PeerLimits  # noqa: E402
from meadow.client.peer_server import Handler, PeerServer  # noqa: E402
from meadow.client.peer_tls import (  # noqa: E402
    HOST_NAME,
    TlsCertificate,
    certificate_of,
    pem_of,
)
from meadow.client.peer_transport import GrpcTransport  # noqa: E402
from meadow.errors import PeerError  # noqa: E402
from meadow.identity import Identity  # noqa: E402

ANYWHERE = "127.0.0.1:0"


def identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def echo(caller: bytes, verb: str, body: bytes) -> bytes:
    return b"%s %s %s" % (caller.hex().encode(), verb.encode(), body)


@dataclass
class Node:
    """One peer: it serves, and calls others."""

    number: int
    handler: Handler = echo
    limits: PeerLimits = field(default_factory=PeerLimits)
    address: str = ANYWHERE

    def __post_init__(self) -> None:
        self.certificate: TlsCertificate = certificate_of(identity(self.number))
        self.peer = self.certificate.peer
        self.book = AddressBook()
        self.server = PeerServer(self.certificate, self.book, self.handler, self.limits)
        self.transport = GrpcTransport(self.certificate, self.book, self.limits)
        self.address = self.server.start(self.address)

    def knows(self, *others: Node) -> None:
        for other in others:
            self.book.put(other.peer, other.certificate.der, other.address)

    def stop(self) -> None:
        self.transport.close()
        self.server.stop(grace=0.0)


@contextmanager
def running(*nodes: Node, acquainted: bool = True) -> Iterator[None]:
    """Peers that all know each other, stopped in the end."""
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.stop)
            if acquainted:
                node.knows(*nodes)
        yield


def raw_channel(certificate: TlsCertificate, to: Node, chain: bytes = b"") -> grpc.Channel:
    """A caller that keeps to nothing but TLS; `chain` (PEM) is shown after its certificate."""
    credentials = grpc.ssl_channel_credentials(
        pem_of(to.certificate.der), certificate.key_pem, pem_of(certificate.der) + chain
    )
    options = [("grpc.ssl_target_name_override", HOST_NAME), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(to.address, credentials, options)


def eventually(check: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(1000):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass")


def answers(caller: Node, called: Node) -> bool:
    """gRPC waits a moment before it connects again."""
    try:
        return caller.transport.call(called.peer, "pull", b"hi").endswith(b"hi")
    except PeerError:
        return False
