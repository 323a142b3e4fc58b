"""The wire encoding: one content, one encoding, and nothing but a plain refusal for other bytes."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meadow.canonical_json import Json
from meadow.errors import FormatError, MeadowError, UpdateError
from meadow.wire import FORMAT, LARGEST_HEADER, decode, encode, require_finite

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
SMALL = {
    "layer.lora_A": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.int8),
}
JSON: st.SearchStrategy[Json] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Tensor]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    tree = {}
    for name in draw(st.lists(text, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        values = torch.randint(-4, 5, shape, generator=generator)
        tree[name] = values.to(draw(st.sampled_from(DTYPES)))
    return tree


def craft(header: bytes | Json, payload: bytes = b"") -> bytes:
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


def entry(dtype: str, shape: Json, start: int, end: int) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_metadata(**entries: Json) -> Json:
    return {"__metadata__": {"json": "null", "meadow": str(FORMAT)}, **entries}


@settings(deadline=None)
@given(trees(), JSON)
def test_round_trip(tree: dict[str, Tensor], meta: Json) -> None:
    data = encode(tree, meta)
    back, back_meta = decode(data, expect={name: tuple(t.shape) for name, t in tree.items()})
    assert back_meta == meta
    assert list(back) == sorted(tree)
    for name, tensor in tree.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert encode(back, back_meta) == data


@settings(deadline=None)
@given(trees())
def test_safetensors_reads_the_same(tree: dict[str, Tensor]) -> None:
    theirs = safetensors.torch.load(encode(tree, {"a": 1}))
    assert theirs.keys() == tree.keys()
    for name, tensor in tree.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor)


def test_bytes_do_not_depend_on_order_or_layout() -> None:
    transposed = {"b": SMALL["b"], "layer.lora_A": SMALL["layer.lora_A"].T.contiguous().T}
    left = encode(SMALL, {"x": 1, "a": [1.5, "é"]})
    assert left == encode(transposed, {"a": [1.5, "é"], "x": 1})


def test_known_bytes() -> None:
    """The format is what it was when this test was written; a change needs another FORMAT."""
    header = (
        b'{"__metadata__":{"json":"{\\"round\\":3}","meadow":"1"},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"I8","shape":[1,1],"data_offsets":[8,9]}}'
    )
    tensors = {"a": torch.tensor([[-1]], dtype=torch.int8), "w": torch.tensor([1.0, -2.0])}
    assert encode(tensors, {"round": 3}) == craft(header, b"\x00\x00\x80\x3f\x00\x00\x00\xc0\xff")


def test_decoded_tensors_may_be_written() -> None:
    data = encode(SMALL, None)
    tensors, _ = decode(data)
    tensors["b"].add_(1)
    assert torch.equal(decode(data)[0]["b"], SMALL["b"])


def test_gradients_and_views_travel_as_values() -> None:
    weight = torch.arange(4.0, requires_grad=True)
    tensors, _ = decode(encode({"w": weight, "half": weight[1:3]}, None))
    assert torch.equal(tensors["half"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_that_is_not_finite_is_refused_on_both_sides(number: float) -> None:
    with pytest.raises(UpdateError, match="JSON"):
        encode({}, {"loss": number})
    for text in ("NaN", "Infinity", "1e999"):
        with pytest.raises(FormatError):
            decode(craft({"__metadata__": {"json": text, "meadow": "1"}}))


def test_types_and_names_that_do_not_travel() -> None:
    with pytest.raises(FormatError, match="complex64"):
        encode({"w": torch.zeros(1, dtype=torch.complex64)}, None)
    with pytest.raises(FormatError, match="__metadata__"):
        encode({"__metadata__": torch.zeros(1)}, None)
    with pytest.raises(FormatError, match="header"):
        encode({}, "x" * LARGEST_HEADER)


def test_another_version_is_refused_by_name() -> None:
    data = craft({"__metadata__": {"json": "null", "meadow": "7"}, "future": "anything"})
    with pytest.raises(FormatError, match=r"format '7'.*reads '1'"):
        decode(data)
    with pytest.raises(FormatError, match="did not write it"):
        decode(safetensors.torch.save({"w": torch.zeros(1)}))


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x00",
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of exabytes": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": craft(b"{{{"),
    "not UTF-8": craft(b'{"\xff": 1}'),
    "a list": craft(b"[]"),
    "nested by the thousand": craft(b"[" * 100_000),
    "digits by the thousand": craft(b'{"a":' + b"9" * 10_000 + b"}"),
    "nested JSON inside": craft({"__metadata__": {"json": "[" * 100_000, "meadow": "1"}}),
    "JSON is no text": craft({"__metadata__": {"json": 3, "meadow": "1"}}),
    "half a character": craft({"__metadata__": {"json": '"\ud800"', "meadow": "1"}}),
    "spaces in the JSON": craft({"__metadata__": {"json": "[1, 2]", "meadow": "1"}}),
    "pickled type": craft(with_metadata(w=entry("PICKLE", [1], 0, 4)), bytes(4)),
    "type is a list": craft(with_metadata(w=entry([], [1], 0, 4)), bytes(4)),  # type: ignore[arg-type]
    "no entry": craft(with_metadata(w=None)),
    "shape is a number": craft(with_metadata(w=entry("F32", 1, 0, 4)), bytes(4)),
    "shape holds a fraction": craft(with_metadata(w=entry("F32", [1.0], 0, 4)), bytes(4)),
    "shape holds a truth value": craft(with_metadata(w=entry("F32", [True], 0, 4)), bytes(4)),
    "negative dimension": craft(with_metadata(w=entry("F32", [-1, -1], 0, 4)), bytes(4)),
    "giant": craft(with_metadata(w=entry("F32", [10**11], 0, 4 * 10**11)), bytes(4)),
    "giant beside a zero": craft(with_metadata(w=entry("F32", [0, 2**48, 2**48], 0, 0))),
    "too many dimensions": craft(with_metadata(w=entry("F32", [1] * 9, 0, 4)), bytes(4)),
    "bytes do not fit the shape": craft(with_metadata(w=entry("F32", [2], 0, 4)), bytes(4)),
    "hole": craft(with_metadata(a=entry("U8", [1], 0, 1), b=entry("U8", [1], 2, 3)), bytes(2)),
    "overlap": craft(with_metadata(a=entry("U8", [1], 0, 1), b=entry("U8", [1], 0, 1)), bytes(2)),
    "backwards": craft(with_metadata(a=entry("U8", [1], 1, 0)), bytes(1)),
    "payload too long": craft(with_metadata(a=entry("U8", [1], 0, 1)), bytes(2)),
    "payload too short": craft(with_metadata(a=entry("U8", [2], 0, 2)), bytes(1)),
    "unordered": craft(with_metadata(b=entry("U8", [1], 0, 1), a=entry("U8", [1], 1, 2)), bytes(2)),
    "name twice": craft(
        b'{"__metadata__":{"json":"null","meadow":"1"},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
    ),
    "truth value of two": craft(with_metadata(a=entry("BOOL", [2], 0, 2)), b"\x01\x02"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_in_one_short_line(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_allocate_little(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 20 * len(data)
    finally:
        tracemalloc.stop()


def test_a_long_foreign_name_is_cut() -> None:
    with pytest.raises(UpdateError) as caught:
        decode(encode({"x\n" * 10_000: torch.zeros(1)}, None), expect={})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_size_is_judged_first() -> None:
    data = encode(SMALL, None)
    assert decode(data, largest=len(data))
    with pytest.raises(FormatError, match=f"at most {len(data) - 1}"):
        decode(data, largest=len(data) - 1)


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"b": (2,)}, r"'layer.lora_A' is not expected"),
        ({"b": (2,), "layer.lora_A": (2, 3), "z": ()}, "'z' is missing"),
        ({"b": (3,), "layer.lora_A": (3, 2)}, r"'b' has shape \(2,\), expected \(3,\)"),
    ],
)
def test_names_and_shapes_are_compared(expect: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        decode(encode(SMALL, None), expect=expect)


VALID = encode({**SMALL, "flag": torch.tensor([True, False])}, {"round": 1, "loss": 2.5})
MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4
)


@settings(max_examples=400, deadline=None)
@given(MUTATIONS, st.integers(0, len(VALID)), st.binary(max_size=9))
def test_mutations_decode_or_are_refused(
    mutations: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(VALID)
    for place, value in mutations:
        data[place] = value
    for variant in (bytes(data), bytes(data[:cut]), bytes(data) + tail, VALID[:cut] + tail):
        try:
            tensors, meta = decode(variant, expect=dict.fromkeys(("b", "flag"), (2,)))
        except (FormatError, UpdateError):
            continue
        assert encode(tensors, meta) == variant


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, craft(noise), craft(b'{"__metadata__":' + noise)):
        with pytest.raises(MeadowError):
            decode(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.tensor([0.0, value]), "n": torch.tensor([1])}
    with pytest.raises(UpdateError, match="client http sent 'b'"):
        require_finite(tensors, "client http")
    del tensors["b"]
    require_finite(tensors, "client http")
