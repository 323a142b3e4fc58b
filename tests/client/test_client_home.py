"""A participant's folder says what is missing in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from homes import RUN, make_home

from meadow.client.home import TERMS, terms_in
from meadow.config import Config
from meadow.errors import ConfigError


def test_the_terms_are_those_in_the_folder(tiny: Config, tmp_path: Path) -> None:
    assert terms_in(make_home(tmp_path / "ada", tiny)).run == RUN


def test_a_folder_without_terms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no .*`meadow client join` makes it"):
        terms_in(tmp_path)


def test_terms_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / TERMS).write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        terms_in(tmp_path)
