"""Where something listens: "host:port", as people write it."""

from __future__ import annotations

import ipaddress
import re

from .errors import FormatError

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PORT = re.compile("0|[1-9][0-9]{0,4}")
_HINT = "write host:port, for example meadow.example.org:8443 or [2001:db8::1]:8443"


def split_address(address: str, least_port: int = 1) -> tuple[str, int]:
    """Host (an IPv6 one without its brackets) and port of "host:port".

    Raises FormatError for what is none, or what gRPC would take for a scheme of its own.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        good = _is_ipv6(host)
    else:
        good = _HOST.fullmatch(host) is not None
    if not good or not _PORT.fullmatch(port):
        raise FormatError(f"{address[:80]!r} is not an address", _HINT)
    if not least_port <= int(port) <= 65535:
        raise FormatError(f"{address[:80]!r} names no port of 65,535 or less", _HINT)
    return host, int(port)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False
