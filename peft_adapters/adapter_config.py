"""`adapter_config.json` from someone else: what meadow would compute differently from PEFT is
refused by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, quoted
from .peft_format import CONFIG
from .safetensors_header import LARGEST_JSON, json_object

# Settings of LoraConfig under which the weight change is not scaling * B @ A of uniform rank.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisations that also change the base's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """As `parse_config`, of an adapter's folder.  Raises AdapterError where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}", "it is not a complete PEFT adapter")
    if path.stat().st_size > LARGEST_JSON:
        raise AdapterError(f"{path} is larger than {LARGEST_JSON} bytes")
    return parse_config(path.read_bytes(), path)


def parse_config(data: bytes, path: Path) -> dict[str, Any]:
    """The settings, which are a LoRA adapter's.  Raises AdapterError."""
    config = json_object(data, path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {quoted(config.get('peft_type'))}, expected 'LORA'"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path is {quoted(base)}, expected text")
    return config


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """The settings that mean something other than a plain LoRA adapter, one line each."""
    problems = [f"{key} is set" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {quoted(config['bias'])}, expected 'none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        problems.append(f"init_lora_weights {quoted(init)} changed the base model too")
    return problems


def rank_in(config: Mapping[str, Any], folder: Path, largest: int) -> int:
    """r.  Raises AdapterError unless it is 1 to `largest`."""
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= largest:
        raise AdapterError(f"{folder / CONFIG}: r is {quoted(rank)}, expected 1 to {largest}")
    return rank


def scaling_in(config: Mapping[str, Any], rank: int, folder: Path) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.  Raises AdapterError."""
    alpha = config.get("lora_alpha")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is None or not number or not 0 < alpha <= sys.float_info.max:
        raise AdapterError(f"{folder / CONFIG}: lora_alpha is no positive number")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
