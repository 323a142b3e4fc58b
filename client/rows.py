"""What one example of text is, and how it is read from JSON lines.

A line is an object with either `text`, or `prompt` and `response`; optional are `client` (the
natural partition key), `split` (train or test) and `label` (what a Dirichlet partition skews).
Other keys are ignored, and null counts as absent.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

EVERYONE = "all"
"""The client of rows that name none."""

FIELDS = ("text", "prompt", "response", "client", "split", "label")
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Row:
    """One example.  Plain text has an empty prompt; `split` is train, test, or "" if not given."""

    client: str
    prompt: str
    response: str
    split: str
    label: str


def row_digest(row: Row) -> bytes:
    """SHA-256 of what the model reads: prompt and response, not who owns them."""
    prompt, response = row.prompt.encode(), row.response.encode()
    return hashlib.sha256(len(prompt).to_bytes(8, "little") + prompt + response).digest()


def parse_row(record: object, where: str) -> Row:
    """The row of one decoded record; `where` (file and line) starts every message.

    Raises DataError where the record isn't a row.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a row is a JSON object, not {type(record).__name__}")
    prompt, response = _texts(record, where)
    client = _name(record, "client", where) or EVERYONE
    split = _string(record, "split", where)
    if split and split not in _SPLITS:
        raise DataError(f"{where}: split is 'train' or 'test', not {split!r}")
    return Row(client, prompt, response, split, _name(record, "label", where) or client)


def read_json_lines(path: Path) -> Iterator[Row]:
    r"""Rows of a JSON lines file, gzip-compressed if it ends in .gz; blank lines are skipped.

    Lines end at "\n" alone: texts may hold U+2028 and other characters that `str.splitlines`
    breaks at.  Raises DataError with file and line number.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield parse_row(_decode(line, where), where)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _decode(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise DataError(f"{where}: malformed JSON: {error}") from None


def _texts(record: Mapping[Any, Any], where: str) -> tuple[str, str]:
    text, prompt, response = (_string(record, name, where) for name in FIELDS[:3])
    if record.get("text") is not None and (prompt or response):
        raise DataError(f"{where}: has text beside prompt or response", "give one or the other")
    if not text.strip() and not prompt and not response:
        raise DataError(f"{where}: has neither text nor prompt and response")
    if not text and not response.strip():
        raise DataError(f"{where}: prompt without a response")
    if record.get("text") is None and record.get("prompt") is None:
        raise DataError(f"{where}: response without a prompt", "plain text goes under 'text'")
    return prompt, text or response


def _string(record: Mapping[Any, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} holds half a surrogate pair") from None
    return value


def _name(record: Mapping[Any, Any], name: str, where: str) -> str:
    """A key that many data sets number instead of naming."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(record, name, where)
