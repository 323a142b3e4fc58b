"""Whether an address can be listened at is what a real listener would find."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from meadow.errors import ConfigError
from meadow.listening import is_free, require_free


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_somebody_listens_at_is_taken(taken: int) -> None:
    assert not is_free("127.0.0.1", taken)
    with pytest.raises(ConfigError, match=rf"cannot listen at 127.0.0.1:{taken}: .*in use \(stop"):
        require_free(f"127.0.0.1:{taken}", "stop it")


def test_on_every_address_it_is_taken_too(taken: int) -> None:
    with pytest.raises(ConfigError, match="in use"):
        require_free(f":{taken}", "")


def test_a_port_that_was_let_go_is_free_and_stays_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(2):
        require_free(f"127.0.0.1:{port}", "")
    assert is_free("127.0.0.1", port)


@pytest.mark.parametrize("address", ["", "host", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"])
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        require_free(address, "")


def test_another_machines_address_cannot_be_listened_at() -> None:
    with pytest.raises(ConfigError, match="cannot listen at 192.0.2.1:9440"):
        require_free("192.0.2.1:9440", "")  # RFC 5737: nobody's
