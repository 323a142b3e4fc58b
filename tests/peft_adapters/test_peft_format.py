"""What is written, PEFT reads and computes as meadow does; what is read is refused or exact."""

from __future__ import annotations

import errno
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meadow.errors import AdapterError, StorageError
from meadow.peft_adapters.layout import Site, Tree
from meadow.peft_adapters.peft_format import (
    CONFIG,
    SERVABLE_RANKS,
    WEIGHTS,
    Adapter,
    check_servable,
    load_adapter,
    save_adapter,
)
from meadow.store import Disk

# PEFT asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TEXT = torch.arange(24).reshape(2, 12)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def sites_of(model: LlamaForCausalLM, *endings: str) -> list[Site]:
    return [
        Site(name, *module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(endings)
    ]


def random_tree(sites: list[Site], rank: int, seed: int = 0) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    tree = {}
    for site in sites:
        tree[f"{site.name}.lora_A"] = torch.randn(rank, site.columns, generator=generator)
        tree[f"{site.name}.lora_B"] = torch.randn(site.rows, rank, generator=generator) / 10
    return tree


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TEXT).logits
    return result


def merged_by_hand(tree: Tree, scaling: float) -> Tensor:
    model = tiny_llama()
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in tree}:
            change = scaling * tree[f"{name}.lora_B"] @ tree[f"{name}.lora_A"]
            model.get_submodule(name).weight += change
    return logits(model)


SITES = [Site("model.layers.0.self_attn.q_proj", 32, 24), Site("model.layers.1.mlp.up", 40, 32)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter, for the tests that spoil it."""
    folder = tmp_path / "adapter"
    save_adapter(folder, random_tree(SITES, 8), scaling=2.0, base="tiny")
    return folder


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 8, 13])
@pytest.mark.parametrize(
    "endings",
    [("_proj",), ("q_proj", "v_proj"), ("0.self_attn.q_proj", "down_proj"), ("lm_head",)],
)
def test_peft_computes_what_meadow_means(
    tmp_path: Path, rank: int, endings: tuple[str, ...]
) -> None:
    model, scaling = tiny_llama(), 1.7
    tree = random_tree(sites_of(model, *endings), rank)
    names = [name for name, _ in model.named_modules()]
    save_adapter(tmp_path, tree, scaling=scaling, base="tiny", modules=names)
    served = PeftModel.from_pretrained(model, tmp_path).eval()
    assert torch.allclose(logits(served), merged_by_hand(tree, scaling), atol=1e-5)
    assert check_servable(tmp_path) == []
    adapted = {key for key in served.state_dict() if ".lora_A." in key}
    assert len(adapted) == len(tree) // 2  # the targets select no other layer


def test_padding_leaves_the_logits_unchanged(tmp_path: Path) -> None:
    tree = random_tree(sites_of(tiny_llama(), "q_proj", "up_proj"), 3)
    save_adapter(tmp_path, tree, scaling=0.3, base="tiny")
    adapter = load_adapter(tmp_path)
    assert adapter.rank == 8
    assert torch.allclose(
        merged_by_hand(adapter.tree, adapter.scaling), merged_by_hand(tree, 0.3), atol=1e-6
    )


def test_a_peft_adapter_of_another_hand_is_read(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj"], init_lora_weights=False)
    peft_model = get_peft_model(tiny_llama(), config).eval()
    peft_model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, sites=sites_of(tiny_llama(), "_proj"))
    assert (adapter.rank, adapter.scaling, adapter.base) == (8, 1.5, "")
    expected = merged_by_hand(adapter.tree, adapter.scaling)
    assert torch.allclose(logits(peft_model), expected, atol=1e-5)
    assert check_servable(tmp_path) == ["base_model_name_or_path is not set"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=2),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**32),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], scaling: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    tree: Tree = {}
    for site, rank in zip(SITES, ranks, strict=True):  # mixed ranks become one
        tree |= random_tree([site], rank, seed)
    save_adapter(folder, tree, scaling=scaling, base="some/base", metadata={"round": "3"})
    adapter = load_adapter(folder, sites=SITES)
    assert adapter.scaling == scaling and adapter.base == "some/base"
    assert adapter.rank == min(r for r in SERVABLE_RANKS if r >= max(ranks))
    assert check_servable(folder) == []
    for name, tensor in tree.items():
        rows, columns = tensor.shape
        read = adapter.tree[name]
        assert torch.equal(read[:rows, :columns], tensor)
        assert read.count_nonzero() == tensor.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = random_tree(SITES, 8)
    save_adapter(tmp_path, tree, scaling=1.0, base="tiny", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    adapter = load_adapter(tmp_path)
    for name, tensor in tree.items():
        assert torch.equal(adapter.tree[name], tensor.to(dtype).float())
    assert check_servable(tmp_path) == []


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    tree = random_tree(SITES, 8)
    metadata = {"b": "1", "a": "2", "round": "3", "run": "x"}
    for folder, order in (("one", sorted(tree)), ("two", sorted(tree, reverse=True))):
        shuffled = {name: tree[name] for name in order}
        save_adapter(tmp_path / folder, shuffled, scaling=2.0, base="tiny", metadata=metadata)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_targets_are_short_only_where_that_selects_nothing_else(tmp_path: Path) -> None:
    def targets(modules: list[str] | None) -> Any:
        save_adapter(tmp_path, random_tree(SITES, 8), scaling=1.0, base="tiny", modules=modules)
        return json.loads((tmp_path / CONFIG).read_text())["target_modules"]

    names = [site.name for site in SITES]
    assert targets(None) == names
    assert targets([*names, "model.norm"]) == ["q_proj", "up"]
    assert targets([*names, "model.layers.1.self_attn.q_proj"]) == [names[0], "up"]


# --- crashes and full disks ----------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


class Failing(Disk):
    """A disk that fails before one of its steps, counted from 0."""

    def __init__(self, step: int, fault: BaseException) -> None:
        self._left, self._fault = step, fault

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._fault

    def fill(self, file: BinaryIO, data: bytes) -> None:
        if self._left == 0:
            super().fill(file, data[: len(data) // 2])
        self._step()
        super().fill(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._step()
        super().sync(file)

    def rename(self, draft: Path, path: Path) -> None:
        self._step()
        super().rename(draft, path)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)


STEPS = 7  # remove the old config; fill, sync and rename two files


@pytest.mark.parametrize("step", range(STEPS))
def test_a_crash_leaves_the_old_adapter_the_new_one_or_a_refused_folder(
    saved: Path, step: int
) -> None:
    old, new = random_tree(SITES, 8), random_tree(SITES, 8, seed=1)
    with pytest.raises(Crash):
        save_adapter(saved, new, scaling=5.0, base="tiny", disk=Failing(step, Crash()))
    if step == 0:
        assert same(load_adapter(saved), old, 2.0)
    else:
        refused(saved, f"has no {CONFIG}")
    save_adapter(saved, new, scaling=5.0, base="tiny", disk=Failing(STEPS + 1, Crash()))
    assert same(load_adapter(saved), new, 5.0)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("step", range(STEPS - 1))
def test_new_weights_of_the_same_run_appear_in_one_piece(saved: Path, step: int) -> None:
    old, new = random_tree(SITES, 8), random_tree(SITES, 8, seed=1)
    with pytest.raises(Crash):
        save_adapter(saved, new, scaling=2.0, base="tiny", disk=Failing(step, Crash()))
    assert same(load_adapter(saved), old if step < 3 else new, 2.0)


def test_a_full_disk_keeps_the_old_adapter(saved: Path) -> None:
    full = Failing(0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageError, match="the disk is full"):
        save_adapter(saved, random_tree(SITES, 8, seed=1), scaling=2.0, base="tiny", disk=full)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert same(load_adapter(saved), random_tree(SITES, 8), 2.0)


def same(adapter: Adapter, tree: Tree, scaling: float) -> bool:
    equal = all(torch.equal(adapter.tree[name], tree[name]) for name in tree)
    return equal and adapter.scaling == scaling and len(adapter.tree) == len(tree)


# --- what is not written -------------------------------------------------------------------------

NAME = SITES[0].name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "empty"),
        ({f"{NAME}.lora_A": torch.ones(8, 24)}, "has no lora_B"),
        ({f"{NAME}.lora_A": torch.ones(8, 24), f"{NAME}.lora_B": torch.ones(32, 7)}, "expected"),
        ({f"{NAME}.lora_A": torch.ones(8), f"{NAME}.lora_B": torch.ones(32, 8)}, "expected"),
        ({f"{NAME}.weight": torch.ones(8, 24)}, "no LoRA factor"),
        ({"a\nb.lora_A": torch.ones(8, 24)}, "no LoRA factor"),
        ({f"{NAME}.lora_A": torch.ones(64, 24), f"{NAME}.lora_B": torch.ones(32, 64)}, "larger"),
        (
            {f"{NAME}.lora_A": torch.full((8, 24), math.nan), f"{NAME}.lora_B": torch.ones(32, 8)},
            "not finite",
        ),
        ({f"{NAME}.lora_A": torch.ones(129, 999), f"{NAME}.lora_B": torch.ones(999, 129)}, "129"),
    ],
)
def test_a_tree_that_is_no_adapter_is_not_written(tmp_path: Path, change: Tree, said: str) -> None:
    with pytest.raises(AdapterError, match=said) as error:
        save_adapter(tmp_path / "new", change, scaling=1.0, base="tiny")
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scaling": 0.0}, "scaling"),
        ({"scaling": math.inf}, "scaling"),
        ({"scaling": math.nan}, "scaling"),
        ({"scaling": 1e308}, "scaling"),
        ({"base": ""}, "base"),
        ({"dtype": torch.int8}, "int8"),
        ({"dtype": torch.float16}, "overflows"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    tree = {name: 1e6 * tensor for name, tensor in random_tree(SITES, 8).items()}
    with pytest.raises(AdapterError, match=said):
        call: dict[str, Any] = {"scaling": 1.0, "base": "tiny"} | settings
        save_adapter(tmp_path, tree, **call)


# --- what is not read ----------------------------------------------------------------------------


def refused(folder: Path, said: str, **kwargs: Any) -> None:
    with pytest.raises(AdapterError, match=said) as error:
        load_adapter(folder, **kwargs)
    assert "\n" not in str(error.value)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
PREFIX = f"base_model.model.{NAME}"


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


# --- the rules for serving -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"target_modules": []}, "target_modules"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
)
def test_each_rule_for_serving_is_checked(saved: Path, changes: dict[str, Any], rule: str) -> None:
    assert check_servable(saved) == []
    configure(saved, **changes)
    (problem,) = check_servable(saved)
    assert rule in problem


def test_ranks_that_servers_do_not_know_are_found(saved: Path) -> None:
    tensors = {
        f"{PREFIX}.lora_A.weight": torch.ones(12, 24),
        f"{PREFIX}.lora_B.weight": torch.ones(32, 12),
    }
    save_file(tensors, saved / WEIGHTS)
    configure(saved, r=12)
    assert check_servable(saved) == [f"r = 12 is not one of {SERVABLE_RANKS}"]
    assert load_adapter(saved).rank == 12  # what cannot be served can still be read
