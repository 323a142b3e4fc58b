"""From the engine's events to OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .openai_types import ChatRequest, CompletionRequest
from .requests import Finished, PromptRead, Token
from .served import Served
from .vocabulary import Vocabulary

Json = dict[str, Any]
_LEAST = -9999.0  # in place of minus infinity, which JSON does not have


@dataclass
class Choice:
    """One of an answer's texts, as far as it is known."""

    prompt: int  # of which prompt it is an answer
    read: Sequence[Token] = ()  # the prompt's own tokens, where they are scored
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None


class Answer(ABC):
    """One request's answer: it gathers tokens, and says them in OpenAI's shapes."""

    kind: str
    """What its id begins with."""
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]],
        model: Served,
        vocabulary: Vocabulary,
    ) -> None:
        self._wants_ids, self._alternatives = asked.return_token_ids, asked.alternatives
        self._usage_in_stream = asked.usage_in_stream
        self._prompts, self._vocabulary = prompts, vocabulary
        self.choices = [Choice(at) for at in range(len(prompts)) for _ in range(asked.n)]
        self._head: Json = {
            "id": f"{self.kind}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": str(model),
            "system_fingerprint": model.fingerprint,
        }

    # Whole

    def read(self, index: int, prompt: PromptRead) -> None:
        self.choices[index].read = prompt.tokens

    def add(self, index: int, token: Token) -> None:
        choice = self.choices[index]
        choice.text.append(token.text)
        choice.tokens.append(token)

    def end(self, index: int, end: Finished) -> None:
        self.choices[index].text.append(end.text)
        self.choices[index].end = end

    def whole(self) -> Json:
        """The answer, once every choice has ended."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        head = {**self._head, "object": self.whole_object}
        return {**head, "choices": choices, "usage": self.usage(), **self._of_whole()}

    def usage(self) -> Json:
        """Each prompt counts once, however many answers it got."""
        prompt = sum(len(ids) for ids in self._prompts)
        made = sum(choice.end.completion_tokens for choice in self.choices if choice.end)
        firsts = {choice.prompt: choice.end for choice in reversed(self.choices)}
        cached = sum(end.cached_tokens for end in firsts.values() if end)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # In chunks

    def opening(self) -> list[Json]:
        """What a stream begins with."""
        return [self._chunk(self._first(index)) for index in range(len(self.choices))]

    def read_chunk(self, index: int, prompt: PromptRead) -> Json:
        """A choice's beginning, where that had to wait for its prompt's log probabilities."""
        self.read(index, prompt)
        return self._chunk(self._first(index))

    def token_chunk(self, index: int, token: Token) -> list[Json]:
        """Nothing, where a token is not to be seen yet."""
        if not token.text and not self._wants_ids and self._alternatives is None:
            return []
        return [self._chunk(self._next(index, token))]

    def end_chunk(self, index: int, end: Finished) -> Json:
        self.end(index, end)
        return self._chunk(self._last(index, end))

    def closing(self) -> list[Json]:
        """What a stream ends with."""
        if not self._usage_in_stream:
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage()}]

    def _chunk(self, choice: Json) -> Json:
        none_yet = {"usage": None} if self._usage_in_stream else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **none_yet}

    def _ids(self, tokens: Sequence[Token]) -> Json:
        return {"token_ids": [token.id for token in tokens]} if self._wants_ids else {}

    # What differs

    def _of_whole(self) -> Json:
        return {}

    @abstractmethod
    def _whole_choice(self, index: int, choice: Choice) -> Json: ...

    @abstractmethod
    def _first(self, index: int) -> Json: ...

    @abstractmethod
    def _next(self, index: int, token: Token) -> Json: ...

    @abstractmethod
    def _last(self, index: int, end: Finished) -> Json: ...


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        model: Served,
        vocabulary: Vocabulary,
        echoed: Sequence[str] = (),
    ) -> None:
        """`echoed` are the prompts' texts, where they are to be repeated."""
        super().__init__(asked, prompts, model, vocabulary)
        self._echoed, self._scored = echoed, asked.scores_prompt
        self._offsets = [Offsets() for _ in self.choices]

    def opening(self) -> list[Json]:
        """Chunks before the first token only where they say something, and can."""
        begins = (self._echoed or self._wants_ids) and not self._scored
        return super().opening() if begins else []

    def read(self, index: int, prompt: PromptRead) -> None:
        super().read(index, prompt)
        shown = b"".join(self._vocabulary.shown(token.id) for token in prompt.tokens)
        # of some tokenizers the first token has a space that is no part of the text
        self._offsets[index] = Offsets(len(self._echo(index)) - len(shown.decode(errors="replace")))

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        assert choice.end is not None
        text = self._echo(index) + "".join(choice.text)
        told = self._choice(index, text, choice.tokens, choice.end.reason, choice.read)
        return {**told, **self._prompt_ids(index)}

    def _first(self, index: int) -> Json:
        told = self._choice(index, self._echo(index), [], None, self.choices[index].read)
        return {**told, **self._prompt_ids(index)}

    def _next(self, index: int, token: Token) -> Json:
        return self._choice(index, token.text, [token])

    def _last(self, index: int, end: Finished) -> Json:
        return self._choice(index, end.text, [], end.reason)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token],
        reason: str | None = None,
        read: Sequence[Token] = (),
    ) -> Json:
        """`read` are those of the prompt."""
        logprobs = self._logprobs(index, [*read, *tokens])
        told = {"index": index, "text": text, "logprobs": logprobs}
        return {**told, "finish_reason": reason, **self._ids(tokens)}

    def _echo(self, index: int) -> str:
        return self._echoed[self.choices[index].prompt] if self._echoed else ""

    def _prompt_ids(self, index: int) -> Json:
        ids = self._prompts[self.choices[index].prompt]
        return {"prompt_token_ids": list(ids)} if self._wants_ids else {}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json | None:
        if self._alternatives is None or not tokens:
            return None
        offsets, vocabulary = self._offsets[index], self._vocabulary
        return {
            "tokens": [vocabulary.piece(token.id).text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._alternatives else None,
            "text_offset": [offsets.before(vocabulary.shown(token.id)) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """The likeliest tokens, and the one that was taken; None for a prompt's first."""
        if token.logprob is None:
            return None
        pairs = [*token.top, (token.id, token.logprob)]
        return {self._vocabulary.piece(id).text: _finite(value) for id, value in reversed(pairs)}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _of_whole(self) -> Json:
        return {"prompt_token_ids": list(self._prompts[0])} if self._wants_ids else {}

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        assert choice.end is not None
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        logprobs = self._logprobs(choice.tokens)
        told = {"index": index, "message": message, "logprobs": logprobs}
        return {**told, "finish_reason": choice.end.reason, **self._ids(choice.tokens)}

    def opening(self) -> list[Json]:
        return [{**chunk, **self._of_whole()} for chunk in super().opening()]

    def _first(self, index: int) -> Json:
        return self._choice(index, {"role": "assistant", "content": ""}, [])

    def _next(self, index: int, token: Token) -> Json:
        return self._choice(index, {"content": token.text}, [token])

    def _last(self, index: int, end: Finished) -> Json:
        return self._choice(index, {"content": end.text} if end.text else {}, [], end.reason)

    def _choice(
        self, index: int, delta: Json, tokens: Sequence[Token], reason: str | None = None
    ) -> Json:
        told = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens)}
        return {**told, "finish_reason": reason, **self._ids(tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if self._alternatives is None or not tokens:
            return None
        content = [
            {
                **self._logprob(token.id, token.logprob),
                "top_logprobs": [self._logprob(id, value) for id, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, id: int, value: float | None) -> Json:
        text, data = self._vocabulary.piece(id)
        return {"token": text, "logprob": _finite(value), "bytes": list(data)}


class Offsets:
    """At which character of a text each of its tokens begins; tokens may end within one."""

    def __init__(self, start: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = start

    def before(self, shown: bytes) -> int:
        """Where the next token begins, which adds these bytes."""
        at = self._at
        self._at += len(self._decoder.decode(shown))
        return max(0, at)


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST)
