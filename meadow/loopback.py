"""A machine's own addresses: who reaches what listens there, and under which names.

On loopback that is every program of the machine, browsers among them.  What asks nobody for a key
there answers only under these names, so that a web page cannot bring a name of its own to point
there (DNS rebinding).
"""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at a host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_names(host: str) -> frozenset[str]:
    """Under which names a server at a loopback host is reached."""
    return frozenset(("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host))


def without_port(host: str) -> str:
    """The name that a request's `Host` calls, in lower case."""
    name, mark, port = host.rpartition(":")
    return (name if mark and port.isdecimal() else host).lower()
