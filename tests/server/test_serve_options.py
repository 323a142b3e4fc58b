"""What a server is called, and where it listens."""

from __future__ import annotations

import gc
import socket
from pathlib import Path

import pytest

from meadow.errors import ConfigError
from meadow.server.serving.serve import (
    ServeOptions,
    bound,
    check_exposure,
    left_alone,
    public_name,
)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("llama-8b", "llama-8b"), ("my model (2)", "my-model-2"), ("模型", "base"), ("a@b", "a-b")],
)
def test_a_folders_name_is_fit_for_headers_and_tells_no_path(
    tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).mkdir()
    assert public_name(str(tmp_path / folder)) == name
    assert public_name(f"{tmp_path}/{folder}/") == name


def test_other_bases_keep_their_names() -> None:
    assert public_name("nano") == "nano"
    assert public_name("org/model-1B") == "org/model-1B"


def test_an_address_is_ours_before_anybody_can_connect() -> None:
    """While the base is loaded, callers are refused rather than kept waiting."""
    with bound("127.0.0.1:0") as listening:
        place = listening.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place, 5)
        listening.listen()
        with pytest.raises(ConfigError, match="cannot listen"), bound(f"127.0.0.1:{place[1]}"):
            pass


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_loopback_needs_no_keys(listen: str) -> None:
    check_exposure(ServeOptions(listen=listen))


def test_the_world_needs_keys_or_a_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        check_exposure(ServeOptions(listen="0.0.0.0:1"))
    check_exposure(ServeOptions(listen="0.0.0.0:1", keys=tmp_path))
    check_exposure(ServeOptions(listen="0.0.0.0:1", open_to_all=True))


def test_what_was_loaded_is_left_alone_while_the_server_answers() -> None:
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    with left_alone():
        assert gc.get_freeze_count() > len(kept)
        assert not any(one is kept for one in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(one is kept for one in gc.get_objects())
