"""Artificial partitions lose no row, repeat none, and depend on the seed alone."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client.partition import share_out
from meadow.errors import ConfigError, DataError

KINDS = ("iid", "dirichlet", "quantity")
LABELS = [f"label {number % 4}" for number in range(400)]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from("abc"), min_size=12, max_size=60),
    st.integers(1, 6),
    st.floats(0.3, 100),
    st.integers(-5, 2**40),
)
def test_every_row_is_in_exactly_one_place(
    kind: str, labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    try:
        shares = share_out(labels, kind, clients, alpha, seed)
    except DataError:
        assert kind == "dirichlet" and clients > 1  # the one that may not find two rows for each
        return
    assert len(shares) == clients and min(map(len, shares)) >= 2
    assert sorted(row for share in shares for row in share) == list(range(len(labels)))
    assert shares == share_out(labels, kind, clients, alpha, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_deals_otherwise(kind: str) -> None:
    assert share_out(LABELS, kind, 4, 1.0, 1) != share_out(LABELS, kind, 4, 1.0, 2)


def test_iid_shares_are_equal() -> None:
    assert {len(share) for share in share_out(LABELS[:-3], "iid", 5, 0.1, 0)} == {79, 80}


def label_skew(alpha: float) -> float:
    """Mean over clients of their commonest label's share."""
    shares = share_out(LABELS, "dirichlet", 4, alpha, 3)
    counts = [[sum(row % 4 == label for row in share) for label in range(4)] for share in shares]
    return sum(max(count) / sum(count) for count in counts) / len(counts)


def test_small_alpha_skews_labels() -> None:
    assert label_skew(0.2) > label_skew(1000) + 0.2
    assert label_skew(1000) < 0.35


def test_small_alpha_skews_sizes_but_not_labels() -> None:
    def spread(alpha: float) -> int:
        sizes = [len(share) for share in share_out(LABELS, "quantity", 4, alpha, 3)]
        return max(sizes) - min(sizes)

    assert spread(0.3) > 100 and spread(1e5) < 10


@pytest.mark.parametrize(("kind", "clients", "alpha"), [("iid", 0, 1), ("iid", 2, 0), ("x", 2, 1)])
def test_impossible_settings(kind: str, clients: int, alpha: float) -> None:
    with pytest.raises(ConfigError):
        share_out(LABELS, kind, clients, alpha, 0)


def test_too_few_rows_or_too_much_skew() -> None:
    with pytest.raises(DataError, match="3 rows are too few for 2 clients"):
        share_out(["a"] * 3, "iid", 2, 1.0, 0)
    with pytest.raises(DataError, match="leaves one of 40 clients"):
        share_out(LABELS, "dirichlet", 40, 1e-3, 0)


def test_nothing_is_reported_to_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a partitioner opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for kind in KINDS:
        share_out(LABELS, kind, 4, 1.0, 0)
