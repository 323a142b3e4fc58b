"""An address is host:port, and nothing that some library would take for something else."""

from __future__ import annotations

import pytest

from meadow.address import split_address
from meadow.errors import FormatError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a:1", ("a", 1)),
        ("10.0.0.1:443", ("10.0.0.1", 443)),
        ("[::1]:8443", ("::1", 8443)),
        ("[2001:db8::1]:7070", ("2001:db8::1", 7070)),
        ("peer.example.org:65535", ("peer.example.org", 65535)),
        ("localhost:7070", ("localhost", 7070)),
        ("a-b.c:80", ("a-b.c", 80)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "", "a", "a:", "a:01", "a:-1", "a:x", "a:1 ", "a:1\n", "a:١", "a:100000",
        ":1", "::1:1", "2001:db8::1:7070", "[::1]", "[::1:7070", "[a]:1",
        "[fe80::1%2]:1", "[fe80::1%eth0]:7070", "a b:1", "a/b:1", "u@h:1", "-a:1", "a.:1",
        "a\n:1", "\n:1", "ä:1", "peer.example.org", "unix:/run/x:7070", "unix:7070:1",
        "dns:///host:7070", "xds:///x:1", "x" * 300 + ":1",
    ],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(FormatError, match="is not an address .write host:port"):
        split_address(address)


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_ports_that_cannot_be(port: str) -> None:
    with pytest.raises(FormatError, match="names no port of 65,535 or less .write host:port"):
        split_address(f"a:{port}")


def test_only_a_listener_may_leave_the_port_open() -> None:
    assert split_address("127.0.0.1:0", least_port=0) == ("127.0.0.1", 0)
    with pytest.raises(FormatError):
        split_address("127.0.0.1:0")
    with pytest.raises(FormatError):
        split_address("127.0.0.1:00", least_port=0)
