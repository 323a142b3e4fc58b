"""Messages come back as they were sent; a contribution that cannot be true is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import RANK, SITES, adapter

from meadow.errors import FormatError, MeadowError, UpdateError
from meadow.strategies.base import State, Turn, Update
from meadow.strategies.messages import (
    INTEGERS,
    check_contribution,
    pack_state,
    pack_update,
    turn_from_json,
    turn_to_json,
    unpack_state,
    unpack_update,
)
from meadow.wire import encode

SHAPES = {f"{s.name}.{f}": s.shape(f, RANK) for s in SITES for f in ("lora_A", "lora_B")}
TURN = Turn(3, 9, 7, 4, 36, "ada", ("ada", "bob"), 2)


def test_an_update_and_its_header_come_back() -> None:
    update = Update(adapter(1), 12.0, 1, {"loss": 0.1, "who": "ä"})
    back, header = unpack_update(pack_update(update, turn=turn_to_json(TURN)))
    assert (back.weight, back.count, back.notes) == (12.0, 1, update.notes)
    assert back.tensors.keys() == update.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in update.tensors.items())
    assert turn_from_json(header["turn"]) == TURN


def test_a_state_comes_back_to_the_bit() -> None:
    state = State({"step": torch.tensor(3.0), **adapter(1)}, {"steps": 7, "discarded": 0.1})
    back = unpack_state(pack_state(state))
    assert back.data == state.data and back.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in state.tensors.items())
    assert unpack_state(pack_state(State())) == State()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_contribution_passes(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in adapter(1).items()}
    update = check_contribution(pack_update(Update(tensors, 3.0)), SHAPES, "ada")
    assert all(torch.equal(update.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_pass_where_a_strategy_sends_them(dtype: torch.dtype) -> None:
    data = pack_update(Update({"q": torch.tensor([-127, 0, 5], dtype=dtype)}, 2.0, sender="eve"))
    update = check_contribution(data, {"q": (3,)}, "ada", INTEGERS)
    assert update.tensors["q"].dtype == dtype and update.tensors["q"].tolist() == [-127, 0, 5]
    assert update.sender == "ada"  # by whom it came, whatever it says
    with pytest.raises(UpdateError, match="^ada: only float32 and bfloat16 tensors"):
        check_contribution(data, {"q": (3,)}, "ada")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int64])
def test_what_is_neither_byte_nor_int32_is_refused(dtype: torch.dtype) -> None:
    data = pack_update(Update({"q": torch.ones(3, dtype=dtype)}, 2.0))
    with pytest.raises(UpdateError, match="^ada: only int8 and int32 tensors"):
        check_contribution(data, {"q": (3,)}, "ada", INTEGERS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block.one.lora_A": torch.zeros(RANK + 1, 5)}, "has shape"),
        ({"block.three.lora_A": torch.zeros(RANK, 5)}, "is not expected"),
        ({"block.one.lora_A": torch.full((RANK, 5), torch.nan)}, "^ada sent .* not finite"),
        ({"block.one.lora_A": torch.full((RANK, 5), -torch.inf)}, "^ada sent .* not finite"),
        (
            {"block.one.lora_A": torch.full((RANK, 5), 1e300, dtype=torch.float64)},
            "^ada: only float32 and",
        ),
        ({"block.one.lora_A": torch.ones(RANK, 5, dtype=torch.int64)}, "^ada: only float32 and"),
    ],
)
def test_tensors_that_cannot_be_counted_are_refused(change: Any, said: str) -> None:
    data = pack_update(Update({**adapter(1), **change}))
    with pytest.raises(UpdateError, match=said):
        check_contribution(data, SHAPES, "ada")


def test_a_missing_tensor_is_refused() -> None:
    tensors = adapter(1)
    del tensors["block.two.lora_B"]
    with pytest.raises(UpdateError, match="'block.two.lora_B' is missing"):
        check_contribution(pack_update(Update(tensors)), SHAPES, "ada")


@pytest.mark.parametrize(
    "meta",
    [
        {"weight": -1.0}, {"weight": 1e10}, {"count": 2}, {"count": 0}, {"count": None},
        {"weight": "nan"}, {"weight": "inf"}, {"weight": []}, {"weight": 10**400},
        {"notes": 3}, {"notes": "ab"}, {"notes": None},
    ],
)  # fmt: skip
def test_a_weight_or_count_that_cannot_be_true_is_refused(meta: dict[str, Any]) -> None:
    data = encode(adapter(1), {"weight": 1.0, "count": 1, "notes": {}, **meta})
    with pytest.raises(MeadowError) as refused:
        check_contribution(data, SHAPES, "ada")
    assert isinstance(refused.value, (UpdateError, FormatError))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("meta", [None, [], "weight", {}, {"weight": 1.0, "count": 1}])
def test_a_message_without_its_frame_is_refused(meta: Any) -> None:
    with pytest.raises(FormatError, match="lacks its weight, count or notes"):
        unpack_update(encode({}, meta))


@pytest.mark.parametrize(
    "fields", [None, [], {}, {"round": 1}, {**turn_to_json(TURN), "surprise": 1}, {"cohort": []}]
)
def test_a_turn_that_is_none_is_refused(fields: Any) -> None:
    with pytest.raises(FormatError, match="whose turn it is"):
        turn_from_json(fields)
