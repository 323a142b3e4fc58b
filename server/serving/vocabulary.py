"""What single tokens are: the text and the bytes that log probabilities are told with.

A token need not be whole characters.  OpenAI then writes its bytes, as in `bytes:\\xe2\\x80`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """A token, as text and as bytes."""

    text: str
    bytes: bytes


class Vocabulary:
    """Any thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._kinds = _decoder_kinds(tokenizer)
        self._alphabet = {letter: byte for byte, letter in _byte_letters().items()}
        self._known: dict[int, Piece] = {}
        self._hidden = {id for id, t in tokenizer.added_tokens_decoder.items() if t.special}

    def piece(self, id: int) -> Piece:
        if id not in self._known:
            name: str | None = self._added.get(id) or self._tokenizer.convert_ids_to_tokens(id)
            nameless = Piece(f"token_id:{id}", b"")  # a row of the model's output, and no token
            self._known[id] = nameless if name is None else _piece(self._bytes(id, name))
        return self._known[id]

    def shown(self, id: int) -> bytes:
        """What a token adds to a text: its bytes, or nothing where texts leave it out."""
        return b"" if id in self._hidden else self.piece(id).bytes

    def _bytes(self, id: int, name: str) -> bytes:
        if id in self._added:
            return name.encode()
        if "ByteLevel" in self._kinds and all(letter in self._alphabet for letter in name):
            return bytes(self._alphabet[letter] for letter in name)
        if "ByteFallback" in self._kinds and (found := _FALLBACK.fullmatch(name)):
            return bytes([int(found[1], 16)])
        if self._kinds & {"Metaspace", "Replace"}:
            return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return str(self._tokenizer.decode([id])).encode()


def _piece(data: bytes) -> Piece:
    try:
        return Piece(data.decode(), data)
    except UnicodeDecodeError:
        return Piece("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """How the tokenizer puts tokens together: the types of its decoder's parts."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return {part["type"] for part in (decoder, *decoder.get("decoders", ()))} if decoder else set()


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """The printable letter by which a byte-level vocabulary names each byte.

    Radford et al. 2019, GPT-2's `bytes_to_unicode`: printable bytes are themselves, all others
    are letters from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + at) for at, byte in enumerate(others)}
