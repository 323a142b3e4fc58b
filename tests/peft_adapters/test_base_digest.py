"""The digest names the stored tensors, and nothing else about their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from meadow.errors import ModelError
from meadow.peft_adapters.base_digest import base_digest

SPELLED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.float64: "F64"}


def reference(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, SPELLED[tensor.dtype], list(tensor.shape)]).encode() + b"\0")
        total.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return total.hexdigest()


def shard(folder: Path, *shards: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"part-{number}.safetensors")
        names |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=4),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3), st.sampled_from(sorted(SPELLED, key=str))
        ),
        min_size=2,
        max_size=5,
    ),
    st.integers(0, 99),
)
def test_equals_the_definition_however_sharded(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[list[int], torch.dtype]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    folder = tmp_path_factory.mktemp("digest")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    some, rest = (dict(list(tensors.items())[start::2]) for start in (0, 1))
    assert base_digest(folder) == reference(tensors)
    assert base_digest(shard(folder / "shards", some, rest)) == reference(tensors)


def test_any_change_changes_it(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    variants = [
        {"w": weight}, {"v": weight}, {"w": weight.view(2, 3)}, {"w": weight.to(torch.float64)},
        {"w": weight.index_fill(0, torch.tensor([5]), 9)}, {"w": weight, "x": torch.ones(1)},
    ]  # fmt: skip
    digests = set()
    for tensors in variants:
        save_file(tensors, tmp_path / "model.safetensors")
        digests.add(base_digest(tmp_path))
    assert len(digests) == len(variants)


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()
    cases = [whole[:-1], whole[:30], b"", b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]"]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(ModelError, match="model.safetensors"):
            base_digest(tmp_path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    for text in (
        "[]",
        '{"weight_map": {"w": 3}}',
        "{",
        '{"weight_map": {"w": "../x.safetensors"}}',
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match="index.json"):
            base_digest(tmp_path)
    folder = shard(tmp_path / "shards", {"w": torch.ones(2)})
    (folder / "part-0.safetensors").unlink()
    with pytest.raises(ModelError, match="part-0.safetensors"):
        base_digest(folder)
