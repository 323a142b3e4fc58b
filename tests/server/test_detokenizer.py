"""Text comes out in pieces that together are the text, and stops where it should."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_models import letters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meadow.server.serving.detokenizer import Detokenizer, StopStrings


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


@cache
def words_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a space before them, which is not written where a text begins."""
    words = {"<unk>": 0, "▁a": 1, "▁dog": 2, "s": 3, "▁": 4, "!": 5}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def shown(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*map(detokenizer.add, tokens), detokenizer.rest()]


@settings(deadline=None)
@given(text=st.text(max_size=20), prompt=st.text(max_size=5))
def test_pieces_are_whole_characters_and_together_the_text(text: str, prompt: str) -> None:
    tokenizer = bytes_tokenizer()
    before, tokens = tokenizer.encode(prompt), tokenizer.encode(text)
    pieces = shown(tokenizer, before, tokens)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert len(tokens) == len(text.encode()) and sum(map(bool, pieces)) <= len(text)


def test_a_character_that_is_never_finished_is_shown_at_the_end() -> None:
    tokens = bytes_tokenizer().encode("aé")[:-1]
    assert shown(bytes_tokenizer(), [], tokens) == ["a", "", "\ufffd"]


def test_bytes_that_never_make_a_character_do_not_pile_up() -> None:
    (token,) = bytes_tokenizer().encode("é")[:1]
    pieces = shown(bytes_tokenizer(), [], [token] * 100)
    assert "".join(pieces) == "\ufffd" * 100 and len([piece for piece in pieces if piece]) > 5


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    prompt=st.lists(st.integers(1, 5), max_size=8),
)
def test_a_leading_space_is_as_in_the_whole(tokens: list[int], prompt: list[int]) -> None:
    tokenizer = words_tokenizer()
    whole, before = tokenizer.decode(prompt + tokens), tokenizer.decode(prompt)
    assert "".join(shown(tokenizer, prompt, tokens)) == whole[len(before) :]


def test_special_tokens_have_no_text() -> None:
    assert "".join(shown(letters(), [], [2, 1, 3, 0, 4])) == "a b c"


TEXTS = st.text("ab", max_size=20)


@given(
    text=TEXTS, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cuts=st.data()
)
def test_text_ends_at_the_first_stop_string_wherever_it_is_cut(
    text: str, stops: list[str], cuts: st.DataObject
) -> None:
    """Nothing is shown that has to be taken back."""
    found = StopStrings(stops)
    out, at = "", 0
    while at < len(text) and not found.found:
        size = cuts.draw(st.integers(1, 4))
        out += found.add(text[at : at + size])
        at += size
    rest = found.rest()
    read = text[:at]
    places = [read.index(stop) for stop in stops if stop in read]
    assert found.found == bool(places)
    assert out + rest == (read[: min(places)] if places else read)
    assert found.add("more") == ("" if places else out_of(found, "more"))


def out_of(found: StopStrings, text: str) -> str:
    """None of the letters of "more" can begin a stop string of "ab"."""
    return text


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert [stops.add(piece) for piece in ("hi\n", "\n", "Use", "less")] == [
        "hi",
        "",
        "",
        "\n\nUseless",
    ]


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_nothing_is_held(stops: list[str]) -> None:
    assert StopStrings(stops).add("abc") == "abc"


def test_tokens_without_text_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be decoded again with every token after it."""
    tokenizer, read = words_tokenizer(), list[int]()
    tokens = [1, *[0] * 500, 2, 3]
    detokenizer = Detokenizer(tokenizer, [])
    own = detokenizer._decode

    def decode(these: list[int]) -> str:
        read.append(len(these))
        return own(these)

    monkeypatch.setattr(detokenizer, "_decode", decode)
    assert "".join(map(detokenizer.add, tokens)) == tokenizer.decode([1, 2, 3]) == "a dogs"
    assert max(read) < 30
