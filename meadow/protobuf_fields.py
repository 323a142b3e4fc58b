"""The fields of a protobuf message, for who has to look into one without knowing all of it.

Protobuf's encoding (https://protobuf.dev/programming-guides/encoding): a field is a tag, which
holds its number and how its value is written, and the value.  Of a field that may come once and
comes twice, readers take the last or merge them, so that whoever decides by one has to refuse two.
"""

from __future__ import annotations

from collections.abc import Iterator

Value = int | bytes
"""A number, or the bytes of a text, a nested message or a number of fixed width."""

_VARINT, _FIXED64, _SIZED, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_TAG_BITS, _NUMBER_BITS = 32, 64


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of every field, in order.  ValueError for what is no message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, _TAG_BITS)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field has the number 0")
        if kind == _VARINT:
            value, at = _varint(message, at, _NUMBER_BITS)
            yield number, value
            continue
        size = _WIDTHS.get(kind, 0)
        if kind == _SIZED:
            size, at = _varint(message, at, _TAG_BITS)
        elif not size:
            raise ValueError("a field is written in another way")
        if size > len(message) - at:
            raise ValueError("a field is cut off")
        yield number, message[at : at + size]
        at += size


def only(message: bytes, number: int) -> Value | None:
    """The value of a field that may come once; None where it does not come.

    ValueError where it comes twice, and for what is no message.
    """
    found = [value for other, value in fields(message) if other == number]
    if len(found) > 1:
        raise ValueError(f"field {number} comes {len(found)} times")
    return found[0] if found else None


def _varint(message: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number in groups of seven bits, least significant first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < bits:
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >> bits:
                break
            return value, at
    raise ValueError("a number is cut off or too long")
