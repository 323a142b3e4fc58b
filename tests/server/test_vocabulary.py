"""The text and bytes of single tokens, against what tokenizers decode whole sequences to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from meadow.nano import FOLDER
from meadow.server.serving.vocabulary import Piece, Vocabulary

NANO = AutoTokenizer.from_pretrained(FOLDER)
NAMED = Vocabulary(NANO)


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_a_texts_tokens_are_its_bytes(text: str) -> None:
    ids = NANO(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert b"".join(NAMED.piece(id).bytes for id in ids) == text.encode()


def test_a_part_of_a_character_is_told_by_its_bytes() -> None:
    ids = NANO("\N{SNOWMAN}", add_special_tokens=False)["input_ids"]
    pieces = [NAMED.piece(id) for id in ids]
    assert len(pieces) > 1, "nano has learned snowmen: take another character"
    assert all(text.startswith("bytes:\\x") for text, _ in pieces)
    assert pieces[0].text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in pieces[0].bytes)


def test_special_tokens_are_their_names() -> None:
    assert NAMED.piece(NANO.bos_token_id) == Piece("<s>", b"<s>")


def test_an_id_without_a_token_says_nothing() -> None:
    assert NAMED.piece(10**6) == Piece("token_id:1000000", b"")


def wrapped(decoder: Any, words: list[str]) -> Vocabulary:
    model = models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0])
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoder
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made))


@pytest.mark.parametrize(
    ("word", "expected"),
    [("\u2581loom", Piece(" loom", b" loom")), ("<0xE2>", Piece("bytes:\\xe2", b"\xe2")),
     ("<0x41>", Piece("A", b"A"))],
)  # fmt: skip
def test_sentencepieces_words_and_bytes(word: str, expected: Piece) -> None:
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    assert wrapped(decoders.Sequence(parts), ["x", word]).piece(1) == expected


def test_other_vocabularies_are_asked_for_the_text() -> None:
    assert wrapped(decoders.WordPiece(), ["x", "##ing"]).piece(1).text == "##ing"
    assert wrapped(None, ["x", "loom"]).piece(1) == Piece("loom", b"loom")


def test_a_byte_level_vocabularys_word_of_other_letters_is_what_it_reads() -> None:
    vocabulary = wrapped(decoders.ByteLevel(), ["x", "a b\u2603"])
    assert vocabulary.piece(1) == Piece("a b\u2603", "a b\u2603".encode())


def test_what_texts_leave_out_adds_nothing_to_them() -> None:
    assert NAMED.shown(NANO.bos_token_id) == b""
    assert NAMED.shown(NANO("a", add_special_tokens=False)["input_ids"][0]) == b"a"
