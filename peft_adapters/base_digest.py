"""The identity of a base model: one hash over its stored tensors.

Two folders hold the same base exactly where their digests agree, however the weights are
sharded and whatever precision they are loaded in.  Files are streamed, never held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lies: absolute byte offsets in its file."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    begin: int
    end: int


def base_digest(folder: Path) -> str:
    """SHA-256, in hex, over all stored tensors of a folder, sorted by name.

    Of each: name, dtype as safetensors spells it and shape, as JSON and a zero byte; its bytes.
    Raises ModelError where there are no safetensors weights or they are damaged.
    """
    total = hashlib.sha256()
    for tensor in sorted(_tensors(folder), key=lambda tensor: tensor.name):
        total.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode() + b"\0")
        for block in _blocks(tensor):
            total.update(block)
    return total.hexdigest()


def _tensors(folder: Path) -> Iterator[_Stored]:
    for file in weight_files(folder):
        try:
            yield from _header(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: not a readable safetensors file: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: one, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS}", "pickled weights (.bin, .pt) are never read")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{folder / INDEX}: not an index of safetensors shards") from None
    if outside:
        raise ModelError(f"{folder / INDEX}: names a file outside its folder: {outside[0]}")
    return [folder / name for name in sorted(names)]


def _header(file: Path) -> Iterator[_Stored]:
    """The format: 8 bytes of header length, little-endian; a JSON header; the tensors' bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"its header claims {length} bytes")
        header: dict[str, Any] = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            yield _Stored(name, entry["dtype"], entry["shape"], file, begin, end)


def _blocks(tensor: _Stored) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        left = tensor.end - tensor.begin
        while left > 0:
            block = _read(stream, min(left, _BLOCK), tensor)
            left -= len(block)
            yield block


def _read(stream: BinaryIO, size: int, tensor: _Stored) -> bytes:
    block = stream.read(size)
    if not block:
        raise ModelError(f"{tensor.file}: ends inside {tensor.name}", "copy it again")
    return block
