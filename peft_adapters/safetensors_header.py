"""The header of a safetensors file (https://huggingface.co/docs/safetensors) from someone else:
every size is checked before a tensor is looked at.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterError, quoted

LARGEST_JSON = 16 * 2**20
"""Bytes; a config or header of a thousand layers has far less."""

_MOST_DIMENSIONS = 8  # of a tensor that is looked at; a longer shape's product may never end
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class Entry(NamedTuple):
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """As `parse_header`, of a file that is there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        return parse_header(start + file.read(_header_length(start, size, path)), size, path)


def parse_header(data: bytes, size: int, path: Path) -> dict[str, Entry]:
    """Names, types, shapes and places of all tensors; every size is consistent with the file's.

    `data` is the file's beginning, and of no consequence after the header.  Raises AdapterError.
    """
    length = _header_length(data, size, path)
    header = json_object(data[8 : 8 + length], path)
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


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys.  Raises AdapterError."""
    try:
        value = json.loads(data, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} does not hold readable JSON") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object")
    return value


def _header_length(start: bytes, size: int, path: Path) -> int:
    """The length of a header, from the first bytes of a file of `size` bytes."""
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, LARGEST_JSON):
        raise AdapterError(f"{path} is no safetensors file: its header has no valid length")
    return length


def _entry(name: str, value: Any, path: Path) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            sizes = len(shape) <= _MOST_DIMENSIONS and all(
                type(size) is int and size >= 0 for size in shape
            )
            if dtype not in _ITEM_BYTES:
                raise AdapterError(
                    f"{path}: {quoted(name)} has type {quoted(dtype)}, expected F32, F16 or BF16"
                )
            if sizes and 0 <= begin and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]:
                return Entry(dtype, tuple(shape), begin, end)
    raise AdapterError(f"{path}: the size of {quoted(name)} contradicts its shape")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, two readers could each take another value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found
