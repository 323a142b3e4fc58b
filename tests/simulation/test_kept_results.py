"""A benchmark that was cut goes on: nothing is measured twice, and nothing of another commit is
mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from meadow.errors import DataError
from meadow.simulation.kept_results import KeptResults

HERE = {"commit": "abc1234", "hardware": "a machine"}


def measured(path: Path, origin: dict[str, str], keys: str) -> str:
    """The keys that had to be measured."""
    done: list[str] = []
    kept = KeptResults(path, origin)
    for key in keys:

        def measure(key: str = key) -> dict[str, str]:
            done.append(key)
            return {"of": key}

        assert kept.result([key, 0.1], measure) == {"of": key}
    return "".join(done)


def test_a_result_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    assert measured(path, HERE, "abab") == "ab"
    assert measured(path, HERE, "abc") == "c"
    assert measured(path, HERE, "abc") == ""


@pytest.mark.parametrize(
    "other",
    [{**HERE, "commit": "def5678"}, {**HERE, "hardware": "another"}],
)
def test_another_commit_or_machine_begins_anew(tmp_path: Path, other: dict[str, str]) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "a")
    assert measured(path, other, "a") == "a"
    assert measured(path, HERE, "a") == "a"


@pytest.mark.parametrize("commit", ["abc1234-dirty", "unknown"])
def test_code_that_has_no_name_keeps_nothing(tmp_path: Path, commit: str) -> None:
    origin = {**HERE, "commit": commit}
    path = tmp_path / "measured.jsonl"
    assert measured(path, origin, "a") == "a"
    assert measured(path, origin, "a") == "a"


def test_a_line_cut_at_any_byte_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "ab")
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert measured(path, HERE, "ab") == ["ab", "ab", "b", ""][lines]
        assert path.read_bytes() == whole


def test_a_file_that_was_edited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "a")
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match="measured.jsonl"):
        KeptResults(path, HERE)
