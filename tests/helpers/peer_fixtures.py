"""Peers of a run over the tiny base, in folders of their own: see tests/helpers/tiny_peers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_peers import Town, found

from meadow.config import Config


@pytest.fixture(scope="module")
def founded(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Town:
    return found(tiny, tmp_path_factory.mktemp("nowhere"), outbound="eve")


@pytest.fixture
def town(founded: Town, tmp_path: Path) -> Town:
    return Town(founded.config, founded.bench, founded.charter, tmp_path)
