"""One connection to the coordinator's gateway: TLS 1.3, HTTP/1.1, one exchange at a time.

A request is signed for the certificate that this very connection showed, so that the connection has
to be there before the request's headers are.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ..address import split_address
from ..closeable import Closeable
from ..errors import GatewayError, IdentityError
from ..fleet_routes import LARGEST_BODY
from ..identity import Identity

CONNECT_SECONDS = 4.0
SILENCE_SECONDS = 30.0
"""How long the gateway may say nothing; it holds a question for messages for up to 20."""

Headers = Callable[[bytes], Mapping[str, str]]
"""The headers of a request on a connection that showed this certificate (DER)."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class GatewayConnection(Closeable):
    """A connection that is made with the first exchange.  One thread at a time uses it."""

    def __init__(self, address: str, tls: ssl.SSLContext) -> None:
        """`address` is "host:port".  Raises FormatError for what is none."""
        host, port = split_address(address)
        self.address = address
        self._http = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=tls)
        self.certificate = b""

    @property
    def is_open(self) -> bool:
        return self._http.sock is not None

    def exchange(self, method: str, path: str, body: bytes, headers: Headers) -> Answer:
        """Send a request and read the whole answer.

        Raises OSError, ssl.SSLError or http.client.HTTPException where the connection fails, after
        which it is closed, and GatewayError for an answer that is too large.
        """
        try:
            if not self.is_open:
                self._connect()
            self._send(method, path, body, headers(self.certificate))
            return self._receive()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._http.close()

    def abort(self) -> None:
        """End an exchange that another thread waits for."""
        sock = self._http.sock
        if sock is not None:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS itself is the other's
            except OSError:
                return

    def _connect(self) -> None:
        self._http.connect()
        sock = self._http.sock
        assert isinstance(sock, ssl.SSLSocket)
        self.certificate = sock.getpeercert(binary_form=True) or b""
        sock.settimeout(SILENCE_SECONDS)

    def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self._http.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            self._http.putheader(name, value)
        if method != "GET":
            self._http.putheader("Content-Length", str(len(body)))
        self._http.endheaders(body or None)

    def _receive(self) -> Answer:
        with self._http.getresponse() as response:
            body = response.read(LARGEST_BODY + 1)
            if len(body) > LARGEST_BODY:
                raise GatewayError("the gateway's answer is too large")
            if response.length:
                raise http.client.IncompleteRead(body)
            if response.will_close:
                self.close()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, body)


def client_tls(authority: str, identity: Identity, certificate: str) -> ssl.SSLContext:
    """How the gateway is known, and how it knows us.

    `authority` (PEM) vouches for the gateway, "" those that the system trusts; `certificate` (PEM)
    is the identity's own, "" before there is one.  Raises IdentityError where they do not fit.
    """
    context = ssl.create_default_context(cadata=authority or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if certificate:
        _require_own(certificate, identity)
        key = identity.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with _readable(certificate.encode()) as chain, _readable(key) as secret:
            context.load_cert_chain(chain, secret)
    return context


def _require_own(certificate: str, identity: Identity) -> None:
    try:
        key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    except ValueError as error:
        raise IdentityError("the membership's certificate cannot be read", "join again") from error
    if key != identity.public:
        raise IdentityError("the membership's certificate is not for this user's key", "join again")


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """A path at which OpenSSL, which takes no bytes, reads them; they are on no disk."""
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)  # a few hundred bytes: any pipe holds them
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)
