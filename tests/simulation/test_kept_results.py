"""A benchmark that was cut goes on: nothing is measured twice, and nothing of another commit is
mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from meadow.errors import DataError
from meadow.simulation.kept_results import KeptResults

HERE = {"commit": "abc1234", "hardware": "a machine"}


def measured(path: Path, origin: dict[str, str], keys: str, *reuse: str) -> str:
    """The keys that had to be measured."""
    done: list[str] = []
    kept = KeptResults(path, origin, reuse)
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


# Results of other commits


NEWER, NEWEST = {**HERE, "commit": "def5678"}, {**HERE, "commit": "fed9876"}


def test_what_another_commit_measured_counts_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "ab")
    assert measured(path, NEWER, "abc", "abc1234") == "c"
    assert measured(path, NEWER, "abc") == "", "from then on the file says whose each line is"
    assert measured(path, NEWEST, "abc", "def5678") == "ab", "of the other named commit c alone"


def test_the_commits_of_what_was_used_are_told(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "a")
    measured(path, NEWER, "b", "abc1234")
    kept = KeptResults(path, NEWEST, ["abc1234", "def5678"])
    assert kept.others == []
    for key, others in (("c", []), ("b", ["def5678"]), ("a", ["abc1234", "def5678"])):
        assert kept.result([key, 0.1], dict) == ({} if key == "c" else {"of": key})
        assert kept.others == others
    assert measured(path, NEWEST, "ab") == ""


@pytest.mark.parametrize(
    ("origin", "reuse"), [(NEWER, "0000000"), ({**NEWER, "hardware": "another"}, "abc1234")]
)
def test_a_commit_that_measured_nothing_here_is_named_before_anything_is_lost(
    tmp_path: Path, origin: dict[str, str], reuse: str
) -> None:
    path = tmp_path / "measured.jsonl"
    measured(path, HERE, "a")
    with pytest.raises(DataError, match=f"has no results of {reuse} on .*first line"):
        KeptResults(path, origin, [reuse])
    assert measured(path, HERE, "a") == ""
