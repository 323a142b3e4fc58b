"""Whether this machine lets us listen at an address, found out before anything depends on it."""

from __future__ import annotations

import errno
import socket
from typing import Any

from .errors import ConfigError


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    return _fault(host, port) is None


def require_free(address: str, hint: str) -> None:
    """Raise ConfigError, with the reason and a hint, unless a server could listen at "host:port".

    No host, as in ":9440", means every address of this machine.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not host:port", hint)
    fault = _fault(host.strip("[]"), int(port))
    if fault is not None:
        raise ConfigError(f"cannot listen at {address}: {fault.strerror or fault}", hint)


def _fault(host: str, port: int) -> OSError | None:
    """Why the host cannot be listened at: one of its addresses is taken or not to be had, or none
    of them can be used (a machine may know of IPv6 and not have it)."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        return error
    faults = []
    for family, kind, protocol, _, address in found:
        try:
            _listen(family, kind, protocol, address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error
            faults.append(error)
    return faults[0] if len(faults) == len(found) else None


def _listen(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> None:
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen(1)
