"""What a connection that stands idle costs the gateway."""

from __future__ import annotations

import socket
import ssl
import tracemalloc
from asyncio import sslproto
from contextlib import ExitStack
from pathlib import Path

import pytest
from gateways import site

from meadow.server.gateway_tls import spare_buffers

CONNECTIONS = 12


def idle_connection_bytes(port: int) -> float:
    """What Python holds for each of some connections over which one request has gone."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for _ in range(CONNECTIONS):
            plain = socket.create_connection(("127.0.0.1", port))
            connection = stack.enter_context(context.wrap_socket(plain))
            connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: gateway\r\n\r\n")
            assert connection.recv(2000)
        return tracemalloc.get_traced_memory()[0] / CONNECTIONS


def test_an_idle_connection_holds_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", 256 * 1024)  # asyncio's own
    with site(tmp_path) as place:
        before = idle_connection_bytes(place.gateway.port)
        spare_buffers()
        after = idle_connection_bytes(place.gateway.port)
    assert before > 256 * 1024
    assert after < 100 * 1024
