"""Silos: who holds what, and what each holds out."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.data import Silo, hold_out, load_silos
from meadow.client.rows import Row
from meadow.errors import ConfigError, DataError

DATA = Path(os.environ.get("MEADOW_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

ROWS = st.lists(
    st.builds(
        Row,
        client=st.just("c"),
        prompt=st.sampled_from(["", "p"]),
        response=st.text("abc", min_size=1, max_size=3),
        split=st.just(""),
        label=st.just("c"),
    ),
    max_size=40,
)


def shared(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in MEADOW_DATA ({DATA})")
    return str(DATA / name)


def content(row: Row) -> tuple[str, str]:
    return row.prompt, row.response


def save(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def all_rows(silos: list[Silo]) -> list[Row]:
    return [row for silo in silos for row in (*silo.train, *silo.held_out)]


@given(ROWS)
def test_hold_out_divides_the_rows(rows: list[Row]) -> None:
    train, held_out = hold_out(rows)
    assert Counter([*train, *held_out]) == Counter(rows)
    contents = set(map(content, rows))
    assert not set(map(content, train)) & set(map(content, held_out))
    assert bool(held_out) == (len(contents) >= 2) and bool(train) == bool(rows)
    if len(contents) == len(rows) >= 2:
        assert len(held_out) == max(1, round(0.2 * len(rows)))


@given(ROWS, st.randoms(use_true_random=False))
def test_hold_out_does_not_depend_on_the_order(rows: list[Row], random: object) -> None:
    shuffled = sorted(rows, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert Counter(hold_out(rows)[1]) == Counter(hold_out(shuffled)[1])


def test_a_given_split_is_kept_and_duplicates_follow_it() -> None:
    rows = [Row("c", "", text, split, "c") for text, split in
            [("a", "test"), ("b", "train"), ("a", ""), ("b", ""), ("c", "")]]  # fmt: skip
    train, held_out = hold_out(rows)
    assert [row.response for row in train] == ["b", "b", "c"]
    assert [row.response for row in held_out] == ["a", "a"]


def test_natural_silos_are_sorted_and_may_be_the_largest(tmp_path: Path) -> None:
    rows = [{"text": f"{client}{number}", "client": client}
            for client, count in [("z", 5), ("b", 3), ("a", 9), ("c", 5)]
            for number in range(count)]  # fmt: skip
    path = save(tmp_path / "rows.jsonl", rows)
    silos = load_silos(path)
    assert [(silo.client, len(silo.train), len(silo.held_out)) for silo in silos] == [
        ("a", 7, 2), ("b", 2, 1), ("c", 4, 1), ("z", 4, 1),
    ]  # fmt: skip
    assert [silo.client for silo in load_silos(path, participants=2)] == ["a", "c"]


def test_a_participant_without_training_rows_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "client": "full"}, {"text": "b", "client": "bare", "split": "test"}]
    with pytest.raises(DataError, match="participant 'bare' has no training rows"):
        load_silos(save(tmp_path / "rows.jsonl", rows))


def test_caps_choose_by_content_and_keep_the_order(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(100)]
    path = save(tmp_path / "rows.jsonl", rows)
    [whole], [part] = load_silos(path), load_silos(path, train_rows=10, held_out_rows=5)
    assert (len(part.train), len(part.held_out)) == (10, 5)
    assert [row for row in whole.train if row in part.train] == list(part.train)
    [less] = load_silos(path, train_rows=4)
    assert set(less.train) < set(part.train) and less.held_out == whole.held_out
    [other] = load_silos(save(tmp_path / "r.jsonl", rows[::-1]), train_rows=10)
    assert set(other.train) == set(part.train)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_artificial_silos_share_all_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"row {number}", "label": str(number % 3)} for number in range(200)]
    path = save(tmp_path / "rows.jsonl", rows)
    silos = load_silos(path, partition=kind, participants=11, alpha=1.0, seed=1)
    assert [silo.client for silo in silos] == [f"client-{number:02d}" for number in range(11)]
    assert all(silo.train and silo.held_out for silo in silos)
    assert sorted(row.response for row in all_rows(silos)) == sorted(row["text"] for row in rows)
    assert silos == load_silos(path, partition=kind, participants=11, alpha=1.0, seed=1)


def test_unknown_partition(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown partition 'even' .known: natural, iid"):
        load_silos(save(tmp_path / "rows.jsonl", [{"text": "a"}]), partition="even", participants=1)


def test_nano_has_eight_participants() -> None:
    silos = load_silos("nano", participants=3, train_rows=20)
    assert len(silos) == 3 and {len(silo.train) for silo in silos} == {20}
    assert len(load_silos("nano")) == 8


def test_dolly_keeps_its_own_split() -> None:
    silos = load_silos(shared("dolly_small.jsonl.gz"))
    assert {(len(silo.train), len(silo.held_out)) for silo in silos} == {(200, 50)}
    assert len(silos) == 8


def test_speakers() -> None:
    silos = load_silos(shared("tinyshakespeare_speakers.jsonl.gz"))
    assert len(silos) == 299 and len(all_rows(silos)) == 7097
    largest = load_silos(shared("tinyshakespeare_speakers.jsonl.gz"), participants=16)
    assert len(largest) == 16 and {silo.client for silo in largest} < {s.client for s in silos}
    for silo in largest:
        count = len(silo.train) + len(silo.held_out)
        assert abs(len(silo.held_out) - 0.2 * count) <= 1


@pytest.mark.long
def test_all_of_dolly_by_dirichlet() -> None:
    silos = load_silos(shared("dolly15k.jsonl.gz"), partition="dirichlet", participants=32)
    assert len(silos) == 32 and len(all_rows(silos)) == 15011
