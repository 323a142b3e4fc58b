"""What the public port shows: TLS 1.3, a certificate that is renewed while it runs, and whose
certificates it accepts.

A client's certificate is optional here, since who enrols has none yet; the routes ask for it.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from ..store import Disk

Issue = Callable[[], tuple[bytes, bytes]]
"""Gives the certificate (PEM, with its chain) and its key (PEM) that hold now."""

_BUFFER = 32 * 1024  # bytes; a record of TLS has half as many


def spare_buffers() -> None:
    """Let this process's connections cost a third: asyncio keeps 256 KiB for each that speaks TLS,
    whether anything passes or not, and every participant holds a few for as long as it is there."""
    sslproto.SSLProtocol.max_size = _BUFFER


class ServerTls:
    """The public port's TLS; new connections use the newest certificate."""

    def __init__(self, folder: Path, issue: Issue, clients: bytes, disk: Disk) -> None:
        """`clients` is the authority of participants' certificates (PEM)."""
        self._pair, self._issue, self._disk = folder / "gateway.pem", issue, disk
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0  # every connection shows its certificate anew
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.context.load_verify_locations(cadata=clients.decode())
        self._shown = b""
        self.refresh()

    @property
    def certificate(self) -> bytes:
        """What a connection that begins now is shown (DER)."""
        return self._der

    def refresh(self) -> None:
        """Take up a certificate that was renewed; no effect where it was not."""
        certificate, key = self._issue()
        if certificate == self._shown:
            return
        self._disk.write(self._pair, key + certificate, 0o600)  # Python reads them from files only
        self.context.load_cert_chain(self._pair)
        self._der = ssl.PEM_cert_to_DER_cert(first_certificate(certificate.decode()))
        self._shown = certificate


class Shown:
    """Which certificate each connection was shown: participants sign it with every request."""

    def __init__(self) -> None:
        self._certificates: dict[asyncio.BaseTransport, bytes] = {}

    def add(self, connection: asyncio.BaseTransport, certificate: bytes) -> None:
        self._certificates[connection] = certificate

    def discard(self, connection: asyncio.BaseTransport) -> None:
        self._certificates.pop(connection, None)

    def of(self, request: web.BaseRequest) -> bytes:
        """The certificate (DER); b"" once the connection is gone."""
        connection = request.transport
        return b"" if connection is None else self._certificates.get(connection, b"")


def superlink_tls(authority: Path) -> ssl.SSLContext:
    """How the SuperLink is known: by the coordinator's own authority and no other."""
    return ssl.create_default_context(cafile=str(authority))


def first_certificate(pem: str) -> str:
    """The first certificate of a chain: the server's own."""
    end = "-----END CERTIFICATE-----"
    start = pem.index("-----BEGIN CERTIFICATE-----")
    return pem[start : pem.index(end, start) + len(end)] + "\n"
