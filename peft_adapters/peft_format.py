"""A LoRA adapter on disk, as PEFT and the servers of LoRA adapters read it.

A folder with `adapter_model.safetensors` (keys `base_model.model.<module>.lora_A.weight` (r, in)
and `.lora_B.weight` (out, r)) and `adapter_config.json`.  Here are the names and the rules that
hold for both directions; adapter_writer writes, adapter_reader reads, servable says what a server
would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import AdapterError
from .layout import FACTORS, modules_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SERVABLE_RANKS = (8, 16, 32, 64, 128)
"""Ranks that vLLM serves, and that are written.  Powers of two, so that lora_alpha / r is exactly
the scaling, and padding needs no change of scale."""
LARGEST_RANK = 512
"""That is read."""

_KEY = re.compile(r"base_model\.model\.(?P<name>[\w.-]+\.lora_[AB])\.weight")

Shapes = Mapping[str, tuple[int, ...]]


def key_of(name: str) -> str:
    """PEFT's key of a tree's tensor, `<module>.lora_A` or `<module>.lora_B`."""
    return f"base_model.model.{name}.weight"


def name_of(key: str) -> str | None:
    """The tree's name of a tensor; None for a key that names no LoRA factor."""
    match = _KEY.fullmatch(key)
    return match["name"] if match else None


def check_pairs(shapes: Shapes, where: str = "") -> None:
    """Each module has both factors, they have a product, and no rank exceeds every layer."""
    for module in modules_of(shapes):
        for factor in FACTORS:
            if f"{module}.{factor}" not in shapes:
                raise AdapterError(f"{where}{module} has no {factor}", "both factors are needed")
        A, B = shapes[f"{module}.lora_A"], shapes[f"{module}.lora_B"]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
            raise AdapterError(
                f"{where}{module} has lora_A {A} and lora_B {B}", "expected (r, in) and (out, r)"
            )
    _check_widest(shapes, where)


def _check_widest(shapes: Shapes, where: str) -> None:
    """One rank serves all layers, so a narrow one may be padded beyond its size, all may not."""
    pairs = [(shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"]) for name in modules_of(shapes)]
    rank = max(A[0] for A, _ in pairs)
    largest = largest_rank((B[0], A[1]) for A, B in pairs)
    if rank > largest:
        raise AdapterError(
            f"{where}rank {rank} is larger than every layer that the adapter changes",
            f"at most {largest} makes sense",
        )


def largest_rank(layers: Iterable[tuple[int, int]]) -> int:
    """The largest rank of an adapter for layers of these shapes (out, in)."""
    widest = max(map(min, layers))
    return next((servable for servable in SERVABLE_RANKS if servable >= widest), widest)
