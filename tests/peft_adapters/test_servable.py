"""What a server of adapters would refuse is said before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, configure, save_tiny
from safetensors.torch import save_file

from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.peft_format import SERVABLE_RANKS, WEIGHTS
from meadow.peft_adapters.servable import check_servable


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "adapter")


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
