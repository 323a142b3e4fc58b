"""What vLLM would refuse about an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, quoted
from .adapter_config import rank_in, read_config, scaling_in, unsupported
from .adapter_reader import shapes_in, weights_in
from .peft_format import LARGEST_RANK, SERVABLE_RANKS
from .safetensors_header import read_header


def check_servable(folder: Path) -> list[str]:
    """The rules for serving by vLLM that the adapter breaks, one line each; empty is fine.

    Reads the config and the header, never the tensors.
    """
    problems = []
    try:
        config = read_config(folder)
        problems = unsupported(config) + _unservable(config)
        rank = rank_in(config, folder, LARGEST_RANK)
        scaling_in(config, rank, folder)
        shapes_in(read_header(weights_in(folder)), folder, rank)
    except AdapterError as error:
        problems.append(str(error))
    return problems


def _unservable(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("r") not in SERVABLE_RANKS:
        problems.append(f"r = {quoted(config.get('r'))} is not one of {SERVABLE_RANKS}")
    if not config.get("base_model_name_or_path"):
        problems.append("base_model_name_or_path is not set")
    if not config.get("target_modules"):
        problems.append("target_modules is not set")
    return problems
