"""What several test files share: the tiny base and its participants, loaded once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imported where they are used, so that small tests stay quick
    from meadow.config import Config
    from meadow.simulation.engine import Lab

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread for each is enough,
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and threads of several would wait for another


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process is left with one of them at the end."""
    items.sort(key=_minutes, reverse=True)


def _minutes(item: pytest.Item) -> float:
    """What its mark says that it may take; 0 for nothing worth a word."""
    mark = item.get_closest_marker("long")
    return mark.kwargs.get("minutes", 0.0) if mark is not None else 0.0


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys that tests make are not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEADOW_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of three clients over a tiny random llama: see tests/helpers/tiny.py."""
    from tiny import tiny_config

    return tiny_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def lab(tiny: Config) -> Lab:
    """The base and the participants of `tiny`; runs may share it."""
    from meadow.simulation.engine import open_lab

    return open_lab(tiny)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name leaves room for a unix socket's."""
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Path]:
    """A fresh folder each time; old ones are removed, to keep the number of files small."""

    def generate() -> Iterator[Path]:
        for number in range(10**6):
            root = tmp_path / str(number)
            root.mkdir()
            yield root
            for path in tmp_path.iterdir():
                shutil.rmtree(path)

    return generate()
