"""Requests that are written byte by byte to a TLS connection with the gateway."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateways import RUN, Person, Site

from meadow.client.gateway_client import GatewayClient
from meadow.client.gateway_connection import client_tls
from meadow.fleet_routes import FLEET

LARGEST = 200_000
PUSH = FLEET + "push-object"


@dataclass
class Wire:
    """A TLS connection to the gateway, on which anything can be written."""

    place: Site
    person: Person
    sock: ssl.SSLSocket = field(init=False)

    def __post_init__(self) -> None:
        tls = client_tls(
            self.person.membership.authority,
            self.person.identity,
            self.person.membership.certificate,
        )
        plain = socket.create_connection(("127.0.0.1", self.place.gateway.port), 5)
        self.sock = tls.wrap_socket(plain, server_hostname="127.0.0.1")
        self.certificate = self.sock.getpeercert(binary_form=True) or b""

    def say(self, data: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; (0, b"") where the connection just ends."""
        return said(self.sock, data)

    def close(self) -> None:
        self.sock.close()


def said(sock: ssl.SSLSocket, data: bytes) -> tuple[int, bytes]:
    try:
        sock.sendall(data)
    except OSError:
        pass  # refused before all was said: the answer may be there
    try:
        method = "HEAD" if data.startswith(b"HEAD ") else None  # whose answer has no body
        answer = http.client.HTTPResponse(sock, method=method)
        answer.begin()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


def written(
    target: str,
    headers: Mapping[str, str] | list[tuple[str, str]],
    body: bytes = b"",
    method: str = "POST",
    version: str = "HTTP/1.1",
    length: bool = True,
) -> bytes:
    """A request as bytes."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    if length:
        pairs.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} {version}", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in pairs]
    return "\r\n".join([*lines, "", ""]).encode() + body


def signed(
    wire: Wire,
    client: GatewayClient,
    target: str = RUN,
    body: bytes = b"question",
    method: str = "POST",
) -> dict[str, str]:
    """All headers that a good request has, signed for exactly this target and body."""
    signature = client._signer.headers(method, target, body, wire.certificate)
    return {**wire.person.headers(client), **signature}
