"""A LoRA adapter on disk, as PEFT and the servers of LoRA adapters read it.

A folder with `adapter_model.safetensors` (keys `base_model.model.<module>.lora_A.weight` (r, in)
and `.lora_B.weight` (out, r)) and `adapter_config.json`.  What is written always keeps to the
rules under which vLLM serves an adapter: nothing but lora_A and lora_B, no bias, no other saved
module, one rank for all layers out of `SERVABLE_RANKS`, and a named base.  Those ranks are powers
of two, so that lora_alpha / r is exactly the scaling, and padding needs no change of scale.

What is read was written by someone else: sizes are checked before anything is parsed, pickle is
never opened, and whatever meadow would compute differently from PEFT is refused by name.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import AdapterError
from ..store import Disk
from .layout import FACTORS, Site, Tree, modules_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SERVABLE_RANKS = (8, 16, 32, 64, 128)
LARGEST_RANK = 512  # that is read

_KEY = re.compile(r"base_model\.model\.(?P<name>[\w.-]+\.lora_[AB])\.weight")
LARGEST_JSON = 16 * 2**20  # bytes; a config or header of a thousand layers has far less
_MOST_DIMENSIONS = 8  # of a tensor that is looked at; a longer shape's product may never end
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)

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


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: `tree` adds scaling * B @ A to each layer that it names."""

    tree: Tree  # float32
    scaling: float
    rank: int
    base: str  # base_model_name_or_path; empty if the folder names none


@dataclass(frozen=True)
class Outline:
    """What an adapter's config and header say, before any tensor is read."""

    shapes: Mapping[str, tuple[int, ...]]  # by the tree's names
    dtypes: tuple[str, ...]  # safetensors' names of those that occur, sorted
    scaling: float
    rank: int
    base: str  # base_model_name_or_path; empty if the config names none


class _Entry(NamedTuple):
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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


def load_adapter(
    folder: Path, *, sites: Iterable[Site] | None = None, largest_rank: int = LARGEST_RANK
) -> Adapter:
    """Read a PEFT LoRA adapter; with `sites` (the base's adaptable layers) it must fit them.

    rsLoRA's scaling alpha / sqrt(r) is understood.  Raises AdapterError, in one line, for anything
    that is not such an adapter, is not finite, or is larger than `largest_rank`.
    """
    outline = _outline(folder, _read_config(folder), _read_header(folder), largest_rank)
    if sites is not None:
        check_fits(outline, sites, folder)
    tree = _read_tensors(folder)
    return Adapter(tree, outline.scaling, outline.rank, outline.base)


def read_outline(
    folder: Path, config: bytes, weights: bytes, *, largest_rank: int = LARGEST_RANK
) -> Outline:
    """As `load_adapter`, of the two files' bytes and without looking at a tensor.

    `folder` is where they come from, for messages.  Raises AdapterError.
    """
    return _outline(
        folder,
        _parse_config(config, folder / CONFIG),
        _parse_header(weights, len(weights), folder / WEIGHTS),
        largest_rank,
    )


def check_fits(outline: Outline, sites: Iterable[Site], folder: Path) -> None:
    """Raise AdapterError unless every adapted module is one of `sites`, with its shape."""
    _check_sites(outline.shapes, {site.name: site for site in sites}, folder)


def read_tensors(folder: Path, weights: bytes) -> Tree:
    """The finite tensors (float32) of weights whose header `read_outline` has found sound.

    Raises AdapterError.
    """
    try:
        tensors = load_bytes(weights)
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
    return _tree_of(tensors, folder)


def _outline(
    folder: Path, config: dict[str, Any], header: dict[str, _Entry], largest_rank: int
) -> Outline:
    for problem in _unsupported(config):
        raise AdapterError(f"{folder / CONFIG}: {problem}", "meadow reads plain LoRA adapters only")
    rank = _rank(config, folder, largest_rank)
    scaling = _scaling(config, rank, folder)
    shapes = _shapes(header, folder, rank)
    dtypes = tuple(sorted({entry.dtype for entry in header.values()}))
    return Outline(shapes, dtypes, scaling, rank, config.get("base_model_name_or_path") or "")


def check_servable(folder: Path) -> list[str]:
    """The rules for serving by vLLM that the adapter breaks, one line each; empty is fine.

    Reads the config and the header, never the tensors.
    """
    problems = []
    try:
        config = _read_config(folder)
        problems = _unsupported(config) + _unservable(config)
        rank = _rank(config, folder, LARGEST_RANK)
        _scaling(config, rank, folder)
        _shapes(_read_header(folder), folder, rank)
    except AdapterError as error:
        problems.append(str(error))
    return problems


# --- writing -----------------------------------------------------------------------------------


def _pairs(tree: Tree) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every module, sorted by name; refuses what is no finite adapter."""
    if not tree:
        raise AdapterError("the adapter is empty", "adapt at least one layer")
    for name, tensor in tree.items():
        if not _KEY.fullmatch(_key(name)):
            hint = "expected <module>.lora_A or .lora_B"
            raise AdapterError(f"{_quote(name)} names no LoRA factor", hint)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} has values that are not finite")
    _check_pairs({name: tuple(tensor.shape) for name, tensor in tree.items()})
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
            tensors[_key(f"{module}.lora_{factor}")] = padded
    return tensors


def _key(name: str) -> str:
    return f"base_model.model.{name}.weight"


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


# --- reading -----------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}", "it is not a complete PEFT adapter")
    if path.stat().st_size > LARGEST_JSON:
        raise AdapterError(f"{path} is larger than {LARGEST_JSON} bytes")
    return _parse_config(path.read_bytes(), path)


def _parse_config(data: bytes, path: Path) -> dict[str, Any]:
    config = _json_object(data, path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type is {_quote(config.get('peft_type'))}, expected 'LORA'"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path is {_quote(base)}, expected text")
    return config


def _quote(text: object) -> str:
    """Foreign text for a one-line message: escaped, and not longer than a line."""
    quoted = repr(text)
    return quoted if len(quoted) <= 120 else quoted[:117] + "..."


def _json_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} does not hold readable JSON") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, two readers could each take another value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = [f"{key} is set" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {_quote(config['bias'])}, expected 'none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        problems.append(f"init_lora_weights {_quote(init)} changed the base model too")
    return problems


def _rank(config: Mapping[str, Any], folder: Path, largest: int) -> int:
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= largest:
        raise AdapterError(f"{folder / CONFIG}: r is {_quote(rank)}, expected 1 to {largest}")
    return rank


def _scaling(config: Mapping[str, Any], rank: int, folder: Path) -> float:
    alpha = config.get("lora_alpha")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is None or not number or not 0 < alpha <= sys.float_info.max:
        raise AdapterError(f"{folder / CONFIG}: lora_alpha is no positive number")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _shapes(header: dict[str, _Entry], folder: Path, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes by the tree's names, from the header: complete, of one rank, no larger than layers."""
    shapes = {_tree_name(key, folder): entry.shape for key, entry in header.items()}
    if not shapes:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors")
    _check_pairs(shapes, f"{folder / WEIGHTS}: ")
    for name, shape in shapes.items():
        if name.endswith(".lora_A") and shape[0] != rank:
            raise AdapterError(
                f"{folder / WEIGHTS}: {name} has rank {shape[0]}, but {CONFIG} says {rank}"
            )
    return shapes


def _read_header(folder: Path) -> dict[str, _Entry]:
    path = _weights(folder)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        return _parse_header(start + file.read(_header_length(start, size, path)), size, path)


def _header_length(start: bytes, size: int, path: Path) -> int:
    """The length of a header, from the first bytes of a file of `size` bytes."""
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, LARGEST_JSON):
        raise AdapterError(f"{path} is no safetensors file: its header has no valid length")
    return length


def _parse_header(data: bytes, size: int, path: Path) -> dict[str, _Entry]:
    """Names, types, shapes and places of all tensors; every size is consistent with the file's.

    `data` is the file's beginning, and of no consequence after the header.
    """
    length = _header_length(data, size, path)
    header = _json_object(data[8 : 8 + length], path)
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise AdapterError(f"{path}: tensors overlap or leave a gap at byte {position}")
        position = entry.end
    if position != size - 8 - length:
        raise AdapterError(f"{path} is cut short or has bytes that no tensor owns")
    return entries


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder / 'adapter_model.bin'} is a pickle, which is never opened",
            "save the adapter as safetensors",
        )
    raise AdapterError(f"{folder} has no {WEIGHTS}", "it is not a complete PEFT adapter")


def _entry(name: str, value: Any, path: Path) -> _Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            sizes = len(shape) <= _MOST_DIMENSIONS and all(
                type(size) is int and size >= 0 for size in shape
            )
            if dtype not in _ITEM_BYTES:
                raise AdapterError(
                    f"{path}: {_quote(name)} has type {_quote(dtype)}, expected F32, F16 or BF16"
                )
            if sizes and 0 <= begin and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]:
                return _Entry(dtype, tuple(shape), begin, end)
    raise AdapterError(f"{path}: the size of {_quote(name)} contradicts its shape")


def _tree_name(key: str, folder: Path) -> str:
    match = _KEY.fullmatch(key)
    if match is None:
        raise AdapterError(
            f"{folder / WEIGHTS}: unexpected tensor {_quote(key)}",
            "expected base_model.model.<module>.lora_A.weight or lora_B.weight",
        )
    return match["name"]


def _check_pairs(shapes: Mapping[str, tuple[int, ...]], where: str = "") -> None:
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


def _check_widest(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
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


def _check_sites(
    shapes: Mapping[str, tuple[int, ...]], sites: Mapping[str, Site], folder: Path
) -> None:
    for module in modules_of(shapes):
        if module not in sites:
            raise AdapterError(
                f"{folder}: {module} matches no layer of the base model",
                "the adapter was made for another base",
            )
        here = sites[module].rows, sites[module].columns
        adapted = shapes[f"{module}.lora_B"][0], shapes[f"{module}.lora_A"][1]
        if adapted != here:
            raise AdapterError(
                f"{folder}: {module} adapts a layer of {adapted}, the base model's is {here}"
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
    return _tree_of(tensors, folder)


def _unreadable(folder: Path, error: SafetensorError) -> AdapterError:
    return AdapterError(f"{folder / WEIGHTS} cannot be read: {_quote(str(error))}")


def _tree_of(tensors: Mapping[str, Tensor], folder: Path) -> Tree:
    tree = {}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{folder / WEIGHTS}: {key} has values that are not finite")
        tree[_tree_name(key, folder)] = tensor.float()
    return tree


def _unservable(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("r") not in SERVABLE_RANKS:
        problems.append(f"r = {_quote(config.get('r'))} is not one of {SERVABLE_RANKS}")
    if not config.get("base_model_name_or_path"):
        problems.append("base_model_name_or_path is not set")
    if not config.get("target_modules"):
        problems.append("target_modules is not set")
    return problems
