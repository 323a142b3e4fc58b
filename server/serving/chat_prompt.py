"""From texts and dialogues to the tokens that a model reads.

A dialogue goes through the tokenizer's chat template.  A base without one was trained on a prompt
and its answer, joined by a line break (`client/encode.py`): there a dialogue is its contents, each
on lines of its own, and roles are not told.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ...errors import TooLongError
from .openai_errors import ApiError
from .openai_types import ChatRequest, CompletionRequest, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """Token ids of what is asked; any thread may use it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, longest: int = 10**6
    ) -> None:
        """The model knows `vocabulary` tokens, and reads `longest` of them at once."""
        self._tokenizer = copy.deepcopy(tokenizer)  # the engine's decodes meanwhile
        self._vocabulary, self._longest = vocabulary, longest
        self._most_characters = longest * max(map(len, tokenizer.get_vocab()))
        self._turn = threading.Lock()

    def of(self, asked: CompletionRequest | ChatRequest) -> list[list[int]]:
        """Every prompt of a request.  Raises ApiError (400) for what no model could read, and
        TooLongError for what is too long whatever its tokens are."""
        with self._turn:
            if isinstance(asked, ChatRequest):
                return [self._checked(self._dialogue(asked.messages), "messages")]
            return [self._checked(self._plain(prompt), "prompt") for prompt in asked.prompt]

    def text(self, prompt: str | list[int]) -> str:
        """A prompt as `echo` repeats it."""
        if isinstance(prompt, str):
            return prompt
        with self._turn:
            return str(self._tokenizer.decode(prompt, skip_special_tokens=True))

    def _plain(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return self._begun(prompt, names=True)

    def _begun(self, text: str, *, names: bool) -> list[int]:
        """With a beginning-of-sequence token, once, where there is one."""
        ids, first = self._ids(text, names), self._tokenizer.bos_token_id
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def _dialogue(self, messages: Sequence[Message]) -> list[int]:
        if not self._tokenizer.chat_template:
            parts = [message.content for message in messages]
            return self._begun("".join(f"{part}{_line_end(part)}" for part in parts), names=False)
        return self._ids(self._rendered([_turn(message) for message in messages]), names=True)

    def _rendered(self, turns: list[dict[str, Any]]) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, KeyError) as error:  # templates refuse orders of roles
            fault = str(error).strip().partition("\n")[0]
            raise ApiError(
                400, f"the model's chat template refuses this dialogue: {fault}", "messages"
            ) from None
        return str(rendered)

    def _ids(self, text: str, names: bool) -> list[int]:
        """With `names`, names of special tokens in the text are those tokens, as in templates;
        otherwise they are mere text."""
        if not text:
            return []
        if len(text) > self._most_characters:  # everybody else's prompts would wait for this one's
            raise TooLongError(
                f"{len(text)} characters are more than {self._longest} tokens", self._longest
            )
        encoding = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not names, verbose=False
        )
        return list(encoding["input_ids"])

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: there is nothing to go on from", param)
        if len(ids) > self._longest:
            raise TooLongError(
                f"{len(ids)} tokens of the prompt are more than {self._longest}", self._longest
            )
        if max(ids) >= self._vocabulary:
            raise ApiError(
                400, f"{param}: the model has {self._vocabulary} tokens, no {max(ids)}", param
            )
        return ids


def _line_end(text: str) -> str:
    return "" if not text or text[-1].isspace() else "\n"


def _turn(message: Message) -> dict[str, Any]:
    """What a template reads.  `developer` is what OpenAI calls `system` since 2024."""
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.content, **named}
