"""What is written, PEFT reads and computes as meadow does."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from adapters import (
    NAME,
    SITES,
    logits,
    merged_by_hand,
    random_tree,
    refused,
    same,
    save_tiny,
    sites_of,
    tiny_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from meadow.errors import AdapterError, StorageError
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.layout import Tree
from meadow.peft_adapters.peft_format import CONFIG, SERVABLE_RANKS, WEIGHTS
from meadow.peft_adapters.servable import check_servable
from meadow.store import Disk

# PEFT asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "adapter")


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


# --- what is not written -------------------------------------------------------------------------


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
