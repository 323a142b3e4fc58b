"""Reading a LoRA adapter that someone else wrote: see peft_format.

Sizes are checked before anything is parsed, pickle is never opened, and whatever meadow would
compute differently from PEFT is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterError, quoted
from .adapter_config import parse_config, rank_in, read_config, scaling_in, unsupported
from .layout import Site, Tree, modules_of
from .peft_format import CONFIG, LARGEST_RANK, WEIGHTS, check_pairs, name_of
from .safetensors_header import Entry, parse_header, read_header


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


def load_adapter(
    folder: Path, *, sites: Iterable[Site] | None = None, largest_rank: int = LARGEST_RANK
) -> Adapter:
    """Read a PEFT LoRA adapter; with `sites` (the base's adaptable layers) it must fit them.

    rsLoRA's scaling alpha / sqrt(r) is understood.  Raises AdapterError, in one line, for anything
    that is not such an adapter, is not finite, or is larger than `largest_rank`.
    """
    outline = _outline(folder, read_config(folder), read_header(weights_in(folder)), largest_rank)
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
        parse_config(config, folder / CONFIG),
        parse_header(weights, len(weights), folder / WEIGHTS),
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


def shapes_in(header: Mapping[str, Entry], folder: Path, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes by the tree's names, from the header: complete, of one rank, no larger than layers."""
    shapes = {_tree_name(key, folder): entry.shape for key, entry in header.items()}
    if not shapes:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensors")
    check_pairs(shapes, f"{folder / WEIGHTS}: ")
    for name, shape in shapes.items():
        if name.endswith(".lora_A") and shape[0] != rank:
            raise AdapterError(
                f"{folder / WEIGHTS}: {name} has rank {shape[0]}, but {CONFIG} says {rank}"
            )
    return shapes


def weights_in(folder: Path) -> Path:
    """The adapter's tensors.  Raises AdapterError where there are none that may be opened."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder / 'adapter_model.bin'} is a pickle, which is never opened",
            "save the adapter as safetensors",
        )
    raise AdapterError(f"{folder} has no {WEIGHTS}", "it is not a complete PEFT adapter")


def _outline(
    folder: Path, config: dict[str, Any], header: dict[str, Entry], largest_rank: int
) -> Outline:
    for problem in unsupported(config):
        raise AdapterError(f"{folder / CONFIG}: {problem}", "meadow reads plain LoRA adapters only")
    rank = rank_in(config, folder, largest_rank)
    scaling = scaling_in(config, rank, folder)
    shapes = shapes_in(header, folder, rank)
    dtypes = tuple(sorted({entry.dtype for entry in header.values()}))
    return Outline(shapes, dtypes, scaling, rank, config.get("base_model_name_or_path") or "")


def _tree_name(key: str, folder: Path) -> str:
    name = name_of(key)
    if name is None:
        raise AdapterError(
            f"{folder / WEIGHTS}: unexpected tensor {quoted(key)}",
            "expected base_model.model.<module>.lora_A.weight or lora_B.weight",
        )
    return name


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
    return AdapterError(f"{folder / WEIGHTS} cannot be read: {quoted(str(error))}")


def _tree_of(tensors: Mapping[str, Tensor], folder: Path) -> Tree:
    tree = {}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{folder / WEIGHTS}: {key} has values that are not finite")
        tree[_tree_name(key, folder)] = tensor.float()
    return tree
