"""Philox against Random123's vectors and against an implementation of its own kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import philox, sign

from meadow.peft_adapters.philox import philox4x32, signs

WORD = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the first three are Random123's
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ((1, 0, 0, 0), (0, 0), "f8e4cca4 5cb200db b1a574eb 097eff67"),
        ((0, 0, 0, 0), (1, 0), "e3e80670 e50a0ebc 95f222c0 b615aa27"),
        ((0, 0, 7, 0), (0x89ABCDEF, 0x01234567), "34b23a77 8ec43d26 fdbf9305 a6c02cf2"),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    found = philox4x32(torch.tensor([counter]), key)[0]
    assert " ".join(f"{word:08x}" for word in found.tolist()) == words


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), st.tuples(WORD, WORD))
def test_int64_that_wraps_agrees_with_uint64(
    counters: list[tuple[int, int, int, int]], key: tuple[int, int]
) -> None:
    found = philox4x32(torch.tensor(counters), key)
    assert found.tolist() == philox(np.array(counters, np.uint64), key).tolist()


def test_known_signs() -> None:
    found = signs(1, 0, 0, 4096)
    assert "".join("+" if s > 0 else "-" for s in found[:16].tolist()) == "++++---++--+++++"
    assert int(found.sum()) == 16 and found.dtype == torch.int8
    assert set(found.tolist()) == {1, -1}


def test_a_known_sum_of_rank_one_signs() -> None:
    total = torch.zeros(4, 4, dtype=torch.int64)
    for seed, q in enumerate((3, -5, 127, -127)):
        total += q * torch.outer(signs(seed, 0, 0, 4).long(), signs(seed, 0, 1, 4).long())
    assert total.tolist() == [
        [8, -8, -2, -262], [256, -256, -262, -2], [8, -8, -2, -262], [2, -2, -8, 252],
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(0, 1), st.integers(0, 1000),
)  # fmt: skip
def test_any_sign_is_where_the_layout_says(
    seed: int, tensor_id: int, part: int, element: int
) -> None:
    assert int(signs(seed, tensor_id, part, element + 1)[element]) == sign(
        seed, tensor_id, part, element
    )


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 640])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count: int) -> None:
    assert torch.equal(signs(9, 2, 1, count), signs(9, 2, 1, 1000)[:count])


def test_streams_differ_in_seed_tensor_and_part() -> None:
    streams = [(1, 0, 0), (2, 0, 0), (1 << 32, 0, 0), (1, 1, 0), (1, 0, 1)]
    assert len({tuple(signs(*stream, 256).tolist()) for stream in streams}) == len(streams)
