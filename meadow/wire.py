"""One byte encoding for named tensors and small JSON: messages, states and client memories.

The bytes are a safetensors file (https://huggingface.co/docs/safetensors) whose metadata holds
the format version and the JSON.  A content has exactly one encoding, whatever library version
wrote it, and `decode` rests on that: a header is accepted when it is, byte for byte, the one that
`encode` writes for the names, types and shapes it declares.  Offsets that overlap, leave holes or
point outside, repeated names and numbers that JSON does not know thus fail one comparison, and
nothing of a tensor's size is allocated before the header has passed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .canonical_json import Json, canonical
from .errors import FormatError, UpdateError, quoted

Shape = tuple[int, ...]

FORMAT = 1
LARGEST = 2**31 - 1  # bytes; a protobuf body holds no more
LARGEST_HEADER = 4 * 2**20  # bytes
_MOST_ELEMENTS = 2**48  # so that no stride can overflow, not even beside a zero
_MOST_DIMENSIONS = 8
_HEADER_HINT = f"at most {LARGEST_HEADER} are allowed: fewer tensors, or less JSON"
_METADATA = "__metadata__"  # the one name that safetensors reserves

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_KINDS = {dtype: kind for kind, dtype in _TYPES.items()}


class _Field(NamedTuple):
    """One tensor as the header declares it."""

    name: str
    kind: str
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _TYPES[self.kind].itemsize

    @property
    def rank(self) -> tuple[int, str]:
        """Wide types come first, so that every tensor is aligned to its own width."""
        return -_TYPES[self.kind].itemsize, self.name


def encode(tensors: Mapping[str, Tensor], meta: Json) -> bytes:
    """Tensors and JSON as bytes; the same content always gives the same bytes.

    Raises UpdateError where `meta` holds a number that is not finite, and FormatError for a type
    of tensor that does not travel or a header that `decode` would refuse for its size.
    """
    try:
        text = canonical(meta)
    except ValueError as error:
        raise UpdateError(f"the message cannot be written as JSON: {error}") from error
    fields = sorted((_declare(name, tensors[name]) for name in tensors), key=lambda f: f.rank)
    header = _header(fields, text)
    if len(header) > LARGEST_HEADER:
        raise FormatError(f"the message needs a header of {len(header)} bytes", _HEADER_HINT)
    payload = (_raw(tensors[field.name]) for field in fields)
    return b"".join([len(header).to_bytes(8, "little"), header, *payload])


def decode(
    data: bytes, *, expect: Mapping[str, Shape] | None = None, largest: int = LARGEST
) -> tuple[dict[str, Tensor], Json]:
    """The inverse of `encode`; tensors own their memory and come sorted by name.

    `largest` bounds the bytes that are looked at.  Raises FormatError for bytes that are not
    exactly an encoding, and UpdateError where names or shapes are not those of `expect`.
    """
    header, payload = _split(data, largest)
    fields, meta = _parse(header)
    declared = sum(field.size for field in fields)
    if declared != len(payload):
        raise FormatError(f"the message declares {declared} bytes and carries {len(payload)}")
    if expect is not None:
        _compare({field.name: field.shape for field in fields}, expect)
    return _tensors(fields, payload), meta


def require_finite(tensors: Mapping[str, Tensor], who: str) -> None:
    """Raise UpdateError that names `who` and the first tensor that holds a NaN or an infinity."""
    for name in sorted(tensors):
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UpdateError(f"{who} sent {quoted(name)} with a value that is not finite")


def _declare(name: str, tensor: Tensor) -> _Field:
    if name == _METADATA:
        raise FormatError(f"no tensor can be called {quoted(name)}")
    if tensor.dtype not in _KINDS:
        raise FormatError(f"tensor {quoted(name)} of type {tensor.dtype} does not travel")
    return _Field(name, _KINDS[tensor.dtype], tuple(tensor.shape))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _header(fields: Iterable[_Field], meta: str) -> bytes:
    """The header of `fields`, in their order, padded to eight bytes."""
    entries: dict[str, Json] = {_METADATA: {"json": meta, "meadow": str(FORMAT)}}
    end = 0
    for field in fields:
        start, end = end, end + field.size
        shape, offsets = list(field.shape), [start, end]
        entries[field.name] = {"dtype": field.kind, "shape": shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _split(data: bytes, largest: int) -> tuple[bytes, memoryview]:
    """Header and payload, once their sizes are believable."""
    if len(data) > largest:
        raise FormatError(f"the message has {len(data)} bytes, at most {largest} are accepted")
    length = int.from_bytes(data[:8], "little")
    if length > LARGEST_HEADER:
        raise FormatError(f"the message claims a header of {length} bytes", _HEADER_HINT)
    if len(data) < 8 + length:
        raise FormatError(f"the message ends inside its header, after {len(data)} bytes")
    return data[8 : 8 + length], memoryview(data)[8 + length :]


def _parse(header: bytes) -> tuple[list[_Field], Json]:
    """What a header declares, after it was found equal to the one that `encode` writes."""
    try:  # RecursionError: brackets nested by the thousand
        entries = json.loads(header)
        text = _meta_text(entries)
        fields = [_field(name, entry) for name, entry in entries.items() if name != _METADATA]
        fields.sort(key=lambda field: field.rank)
        meta = json.loads(text)
        exact = canonical(meta) == text and _header(fields, text) == header
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the message's header cannot be read: {quoted(str(error))}") from error
    if not exact:
        raise FormatError("the message's header contradicts itself or is not in canonical form")
    return fields, meta


def _meta_text(entries: Json) -> str:
    """The JSON text in the metadata, once the version is known to be ours."""
    metadata = entries.get(_METADATA) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or "meadow" not in metadata:
        raise FormatError("the message carries no format version: meadow did not write it")
    if metadata["meadow"] != str(FORMAT):
        raise FormatError(
            f"the message has format {quoted(metadata['meadow'])}, this meadow reads '{FORMAT}'",
            "install the same version of meadow on both sides",
        )
    text = metadata.get("json")
    if not isinstance(text, str):
        raise FormatError("the message's metadata holds no JSON text")
    return text


def _field(name: str, entry: Json) -> _Field:
    """One declared tensor whose type and shape a machine can hold."""
    kind = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise FormatError(f"tensor {quoted(name)} has type {quoted(kind)}, which does not travel")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise FormatError(f"tensor {quoted(name)} has no shape of {_MOST_DIMENSIONS} dimensions")
    if not all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in shape):
        raise FormatError(f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    if math.prod(max(n, 1) for n in shape) > _MOST_ELEMENTS:
        raise FormatError(f"tensor {quoted(name)} is too large: {quoted(shape)}")
    return _Field(name, kind, tuple(shape))


def _compare(found: Mapping[str, Shape], expect: Mapping[str, Shape]) -> None:
    """Raise UpdateError at the first name, in sorted order, where the two differ."""
    for name in sorted(found.keys() | expect.keys()):
        if name not in found:
            raise UpdateError(f"tensor {quoted(name)} is missing")
        if name not in expect:
            raise UpdateError(f"tensor {quoted(name)} is not expected")
        if found[name] != tuple(expect[name]):
            raise UpdateError(
                f"tensor {quoted(name)} has shape {found[name]}, expected {tuple(expect[name])}"
            )


def _tensors(fields: Iterable[_Field], payload: memoryview) -> dict[str, Tensor]:
    tensors, end = {}, 0
    for field in fields:
        start, end = end, end + field.size
        tensors[field.name] = _tensor(field, bytearray(payload[start:end]))
    return dict(sorted(tensors.items()))


def _tensor(field: _Field, raw: bytearray) -> Tensor:
    if field.kind == "BOOL" and raw.translate(None, b"\0\1"):
        raise FormatError(f"tensor {quoted(field.name)} holds a truth value that is not 0 or 1")
    dtype = _TYPES[field.kind]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(field.shape)
