"""What is read is refused, in one line, or exact."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import NAME, PREFIX, SITES, configure, random_tree, refused, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from meadow.errors import AdapterError
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.peft_format import CONFIG, WEIGHTS
from meadow.peft_adapters.servable import check_servable


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "x\n" * 999}, "peft_type"),
        ({"r": 16}, "rank 8, but adapter_config.json says 16"),
        ({"r": 0}, "expected 1 to 512"),
        ({"r": 1024}, "expected 1 to 512"),
        ({"r": "8"}, "expected 1 to 512"),
        ({"r": True}, "expected 1 to 512"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_a_config_that_means_something_else_is_refused(
    saved: Path, changes: dict[str, Any], said: str
) -> None:
    configure(saved, **changes)
    refused(saved, said)
    assert check_servable(saved)


def test_rslora_is_understood(saved: Path) -> None:
    configure(saved, use_rslora=True, lora_alpha=8)
    assert load_adapter(saved).scaling == 8 / math.sqrt(8)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, b"\xff\xfe\x00".decode("latin1")])
def test_an_unreadable_config_is_refused(saved: Path, text: str) -> None:
    (saved / CONFIG).write_text(text, encoding="latin1")
    refused(saved, "JSON")


def test_missing_files_are_named_and_pickle_is_never_opened(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    refused(saved, "pickle")
    (saved / "adapter_model.bin").unlink()
    refused(saved, WEIGHTS)
    assert check_servable(saved)
    (saved / CONFIG).unlink()
    refused(saved, CONFIG)
    refused(saved / "nowhere", CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(saved: Path, value: float) -> None:
    tensors = load_file(saved / WEIGHTS)
    key = f"base_model.model.{NAME}.lora_B.weight"
    tensors[key][3, 4] = value
    save_file(tensors, saved / WEIGHTS)
    refused(saved, f"{NAME}.lora_B.weight has values that are not finite")


Tensors = dict[str, Tensor]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{PREFIX}.lora_magnitude_vector": torch.ones(32)}, "unexpected tensor"),
        ({f"{PREFIX}.lora_B.bias": torch.ones(32)}, "unexpected tensor"),
        ({"base_model.model.lm_head.weight": torch.ones(4, 4)}, "unexpected tensor"),
        ({"two\nlines": torch.ones(4)}, "unexpected tensor"),
        ({"base_model.model.a\rb.lora_A.weight": torch.ones(4)}, "unexpected tensor"),
        ({f"{PREFIX}2.lora_A.weight": torch.ones(8, 24)}, "has no lora_B"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(4, 24)}, "expected"),
        ({f"{PREFIX}.lora_B.weight": torch.ones(32, 8, 1)}, "expected"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(8, 24, dtype=torch.int32)}, "has type 'I32'"),
    ],
)
def test_tensors_that_are_no_plain_adapter_are_refused(
    saved: Path, changes: Tensors, said: str
) -> None:
    save_file(load_file(saved / WEIGHTS) | changes, saved / WEIGHTS)
    refused(saved, said)
    assert check_servable(saved)


def test_an_adapter_of_another_base_is_refused(saved: Path) -> None:
    assert load_adapter(saved, sites=SITES).rank == 8
    refused(saved, "matches no layer", sites=SITES[:1])
    refused(saved, r"adapts a layer of \(32, 24\)", sites=[Site(NAME, 32, 25), SITES[1]])


def test_a_rank_beyond_the_limit_or_the_layers_is_refused(saved: Path) -> None:
    refused(saved, "expected 1 to 4", largest_rank=4)
    wide = {
        f"{PREFIX}.lora_A.weight": torch.ones(64, 24),
        f"{PREFIX}.lora_B.weight": torch.ones(32, 64),
    }
    save_file(wide, saved / WEIGHTS)
    configure(saved, r=64)
    refused(saved, "rank 64 is larger than every layer")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


KEY = f"{PREFIX}.lora_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [8, 25]},
        {"shape": [2**62, 2**62]},
        {"shape": [-8, -24]},
        {"shape": [8.0, 24.0]},
        {"shape": "8"},
        {"dtype": 7},
        {"dtype": "F64"},
        {"data_offsets": [-768, 0]},
        {"data_offsets": [10**9, 10**9 + 768]},
        {"data_offsets": [0]},
        {"data_offsets": [4, 772]},
    ],
)
def test_sizes_are_checked_before_parsing(saved: Path, change: dict[str, Any]) -> None:
    header, data = header_of(saved / WEIGHTS)
    header[KEY] |= change
    write_header(saved / WEIGHTS, header, data)
    refused(saved, WEIGHTS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", len(data)) + data[8:],
        lambda data: struct.pack("<Q", 2) + b"[]",
        lambda data: struct.pack("<Q", 2) + b"{}",
        lambda data: data[:8] + b"\xff" * 64 + data[72:],
    ],
)
def test_torn_files_are_refused(saved: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = saved / WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    refused(saved, WEIGHTS)
    assert check_servable(saved)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_flipped_byte_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, random_tree(SITES[:1], 8), scaling=2.0, base="tiny")
    path = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, min(len(content), 400) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_adapter(folder, sites=SITES)
    except AdapterError as error:
        assert "\n" not in str(error)
