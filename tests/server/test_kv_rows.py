"""Keys and values stay with their request, whatever moves, and go on only to their like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.errors import ConfigError
from meadow.server.serving.kv_rows import KVRows, Owner, Row, Shape

LENGTH = 12
OWNERS = [Owner("", "t"), Owner("d1", "t"), Owner("d2", "t"), Owner("d1", "u")]


def mark(owner: Owner, tokens: list[int], at: int) -> float:
    """A number that says which text of which owner a position belongs to."""
    return float(hash((owner, tuple(tokens[: at + 1]))) % 10**6 + 1)


def compute(kv: KVRows, row: Row, token: int) -> None:
    """As a model would: the number depends on all tokens up to here and on the owner."""
    assert row.owner is not None
    at = len(row.tokens)
    row.tokens.append(token)
    kv.data[:, :, row.index, :, at] = mark(row.owner, row.tokens, at)


def check(kv: KVRows, row: Row) -> None:
    """All that a row says it holds is there, and nothing that is not finite is beyond it."""
    assert row.owner is not None and kv.rows[row.index] is row
    for at in range(len(row.tokens)):
        assert (kv.data[:, :, row.index, :, at] == mark(row.owner, row.tokens, at)).all()
    assert kv.data[:, :, row.index].isfinite().all()


TEXT = st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH - 4)
EVENTS = st.one_of(
    st.tuples(st.just("take"), st.sampled_from(OWNERS), TEXT, st.integers(0, 4)),
    st.tuples(st.just("give"), st.integers(0, 9), st.booleans(), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENTS, max_size=40), rows=st.integers(1, 5))
def test_rows_hold_what_they_say_through_any_history(events: list[Any], rows: int) -> None:
    kv = KVRows(Shape(2, 1, 2), rows, LENGTH, torch.device("cpu"), torch.float32)
    busy: list[Row] = []
    for kind, which, what, more in events:
        if kind == "take" and kv.free:
            known = [list(row.tokens) for row in kv.rows if row.owner == which]
            row = kv.take(which, what)
            assert row.tokens == what[: len(row.tokens)] and len(row.tokens) < len(what)
            expected = max((shared(text, what) for text in known), default=0)
            assert len(row.tokens) == min(expected, len(what) - 1)
            check(kv, row)
            for token in [*what[len(row.tokens) :], *[1] * more]:
                compute(kv, row, token)
            busy.append(row)
        elif kind == "give" and busy:
            row = busy.pop(which % len(busy))
            if not what:
                kv.data[:, :, row.index, :, : len(row.tokens)] = torch.nan
            kv.give(row, keep=what)
        for row in busy:
            check(kv, row)
        assert sorted(row.index for row in kv.rows) == list(range(rows))
        gaps = sum(not row.busy for row in kv.rows[: kv.span])
        assert 4 * gaps <= max(kv.span, 4 * (kind == "take"))


def shared(one: list[int], other: list[int]) -> int:
    return next((n for n in range(min(len(one), len(other)), 0, -1) if one[:n] == other[:n]), 0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_is_committed_when_a_row_is_used() -> None:
    """Whatever the size of the system's pages."""
    before = resident()
    kv = KVRows(Shape(16, 8, 64), 16, 4096, torch.device("cpu"), torch.float32)
    compute(kv, kv.take(OWNERS[0], [1, 2]), 1)
    assert resident() - before < kv.data.nbytes / 8


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match="no memory for 64 texts of 1073741824 tokens"):
        KVRows(Shape(64, 8, 128), 64, 2**30, torch.device("cpu"), torch.float32)


def test_a_gpu_without_room_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand so on")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(ConfigError, match="no memory for 64 texts of 8192 tokens .serve fewer"):
        KVRows(Shape(16, 8, 64), 64, 8192, torch.device("cuda"), torch.bfloat16)
