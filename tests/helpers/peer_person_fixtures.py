"""Users of `meadow peer` over one tiny base: see tests/helpers/peer_person.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from peer_person import Person
from tiny import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ada(tmp_path: Path, base: Path) -> Person:
    return Person(tmp_path / "ada", base, participant="ada", records=1)


@pytest.fixture
def bob(tmp_path: Path, base: Path) -> Person:
    return Person(tmp_path / "bob", base, participant="bob", records=1)


@pytest.fixture
def worked(ada: Person) -> Person:
    """Ada has founded a run and made a record."""
    ada.do("charter", "run.toml")
    ada.work()
    return ada
