"""An empty registry for each test: a pytest plugin, used with registries.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import open_registry

from meadow.server.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path) as registry:
        yield registry
