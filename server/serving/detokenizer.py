"""Tokens to text that may be shown: whole characters, and nothing that may begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 6  # tokens of the prompt that say whether a space comes first
_BROKEN = "\ufffd"  # how an incomplete character decodes
_LONGEST = 12  # tokens after which bytes that make no character are shown as such


class Detokenizer:
    """Text grows by what each token adds to the text of those just before it, because a token's
    own text may depend on them (a leading space, a character's second byte)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt[-_CONTEXT:])  # tokens whose text is out already
        self._after: list[int] = []
        self._out = len(self._decode(self._before))  # characters of those

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        self._after.append(token)
        text = self._text()
        if text.endswith(_BROKEN) and len(self._after) < _LONGEST:
            return ""
        return self._shown(text)

    def rest(self) -> str:
        """What is left, complete or not."""
        return self._shown(self._text()) if self._after else ""

    def _text(self) -> str:
        return self._decode(self._before + self._after)[self._out :]

    def _shown(self, text: str) -> str:
        if text:  # a token without text has to be seen together with the next
            self._before, self._after = self._after, []
            self._out = len(self._decode(self._before))
        elif len(self._after) >= _LONGEST:  # but so many are names that have none
            self._after = []
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Text up to the first of some strings, of which no part is let out before it is known."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be shown now; nothing more once one was `found`."""
        if not self._strings or self.found:
            return "" if self.found else text
        self._held += text
        places = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if places:
            self.found = True
            return self._out(min(places))
        return self._out(len(self._held) - max(map(self._begun, self._strings)))

    def rest(self) -> str:
        """What was held back in vain."""
        return "" if self.found else self._out(len(self._held))

    def _begun(self, string: str) -> int:
        """How much of the string the held text ends with."""
        most = min(len(string) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(string[:n])), 0)

    def _out(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown
