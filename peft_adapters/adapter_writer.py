"""Writing a LoRA adapter: see peft_format.

What is written always keeps to the rules under which vLLM serves an adapter: nothing but lora_A
and lora_B, no bias, no other saved module, one rank for all layers out of `SERVABLE_RANKS`, and a
named base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import AdapterError, quoted
from ..store import Disk
from .layout import Tree, modules_of
from .peft_format import CONFIG, SERVABLE_RANKS, WEIGHTS, check_pairs, key_of, name_of

_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)


def save_adapter(
    folder: Path,
    tree: Tree,
    *,
    scaling: float,
    base: str,
    modules: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    disk: Disk | None = None,
) -> None:
    """Write `tree` (`<module>.lora_A`, `<module>.lora_B`) as a standard PEFT adapter.

    Ranks are padded with zeros to one servable rank; the weight change is unchanged.  `modules`
    names all modules of the base (`model.named_modules()`): with it `target_modules` uses short
    names ("q_proj") where they mean exactly the adapted layers; without it, full names.
    `metadata` goes to the safetensors header.  Equal arguments give equal bytes.

    A crash leaves the old adapter, the new one, or a folder without config that is refused; never
    a mixture.  Raises AdapterError for a tree that is no finite adapter, StorageError if the disk
    is full or not writable.
    """
    pairs = _pairs(tree)
    _check_settings(scaling, base, dtype)
    rank = _servable_rank(max(len(A) for A, _ in pairs.values()))
    weights = _encode(_padded(pairs, rank, dtype), metadata or {})
    config = _config(rank, scaling, base, _targets(list(pairs), modules))
    _write_both(folder, weights, config, disk or Disk())


def _pairs(tree: Tree) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every module, sorted by name; refuses what is no finite adapter."""
    if not tree:
        raise AdapterError("the adapter is empty", "adapt at least one layer")
    for name, tensor in tree.items():
        if name_of(key_of(name)) is None:
            hint = "expected <module>.lora_A or .lora_B"
            raise AdapterError(f"{quoted(name)} names no LoRA factor", hint)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} has values that are not finite")
    check_pairs({name: tuple(tensor.shape) for name, tensor in tree.items()})
    return {name: (tree[f"{name}.lora_A"], tree[f"{name}.lora_B"]) for name in modules_of(tree)}


def _check_settings(scaling: float, base: str, dtype: torch.dtype) -> None:
    if not (scaling > 0 and math.isfinite(scaling * SERVABLE_RANKS[-1])):
        raise AdapterError(f"an adapter's scaling cannot be {scaling}", "use a positive number")
    if not base:
        raise AdapterError("the adapter names no base model", "servers refuse it without")
    if dtype not in _WRITTEN:
        hint = "use float32, bfloat16 or float16"
        raise AdapterError(f"adapters are not written as {dtype}", hint)


def _servable_rank(rank: int) -> int:
    for servable in SERVABLE_RANKS:
        if rank <= servable:
            return servable
    raise AdapterError(
        f"rank {rank} is above {SERVABLE_RANKS[-1]}, the largest that is written",
        "truncate the adapter first",
    )


def _padded(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by PEFT's keys; zeros in both factors leave every product as it is."""
    tensors = {}
    for module, (A, B) in pairs.items():
        missing = rank - len(A)
        for factor, tensor, padding in (("A", A, (0, 0, 0, missing)), ("B", B, (0, missing))):
            padded = torch.nn.functional.pad(tensor.detach().cpu(), padding).to(dtype).contiguous()
            if not bool(torch.isfinite(padded).all()):
                raise AdapterError(f"{module}.lora_{factor} overflows {dtype}", "use float32")
            tensors[key_of(f"{module}.lora_{factor}")] = padded
    return tensors


def _encode(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Safetensors bytes with a sorted header: the library orders metadata differently each time."""
    encoded: bytes = save(tensors)
    start = 8 + int.from_bytes(encoded[:8], "little")
    header = json.loads(encoded[8:start])
    header["__metadata__"] = {"format": "pt", **metadata}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text + encoded[start:]


def _config(rank: int, scaling: float, base: str, targets: list[str]) -> bytes:
    alpha = scaling * rank  # exact: the rank is a power of two
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2).encode() + b"\n"


def _targets(adapted: list[str], modules: Iterable[str] | None) -> list[str]:
    """Names that select exactly `adapted`: PEFT takes each module that is, or ends in, .<name>."""
    if modules is None:
        return sorted(adapted)
    taken = {name.rpartition(".")[2] for name in set(modules) - set(adapted)}
    shorts = {name: name.rpartition(".")[2] for name in adapted}
    return sorted({name if short in taken else short for name, short in shorts.items()})


def _write_both(folder: Path, weights: bytes, config: bytes, disk: Disk) -> None:
    disk.folder(folder)
    target = folder / CONFIG
    if target.exists() and target.read_bytes() != config:
        disk.delete(target)  # the new weights must never be read with the old settings
        disk.confirm(folder)
    disk.write(folder / WEIGHTS, weights)
    disk.write(target, config)
