"""What several test files share: the tiny base and its participants, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imported where they are used, so that small tests stay quick
    from meadow.config import Config
    from meadow.simulation.engine import Lab


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
