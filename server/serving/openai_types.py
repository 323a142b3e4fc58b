"""What may be asked: the bodies of OpenAI's (chat) completions, with some of vLLM's extensions.

Every key is known.  One that would change the answer is obeyed or refused, never passed over.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from .openai_errors import ApiError
from .requests import Sampling

MOST_CHOICES = 128
"""Answers to one request: prompts times `n`."""
MOST_ALTERNATIVES = 20
_TOO_MANY = f"prompts times n, at most {MOST_CHOICES}"
_MOST_STOPS, _LONGEST_STOP = 16, 512
_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""

_NO_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "prompt_cache_retention")
)  # fmt: skip
_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""What is not supported, and the values of it that ask for nothing."""


def _stops(value: Any) -> Any:
    """One string or several: several."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("a string, or a list of strings")
    if len(stops) > _MOST_STOPS or any(not 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise ValueError(f"at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
    return stops


def _prompts(value: Any) -> Any:
    """A text or token ids, or several of one kind: several."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list):
        prompts = []
    if prompts and all(type(part) is int for part in prompts):
        prompts = [prompts]
    if len(prompts) > MOST_CHOICES:  # before each is looked at: a body holds a million of them
        raise ValueError(_TOO_MANY)
    texts = all(isinstance(part, str) for part in prompts)
    if not prompts or not (texts or all(_are_ids(part) for part in prompts)):
        raise ValueError("a string, a list of strings, a list of token ids, or a list of those")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(id) is int and 0 <= id < 2**31 for id in value)


def _text(value: Any) -> Any:
    """A message's content: a string, or parts that are text."""
    if isinstance(value, str):
        return value
    match value:
        case [*parts] if parts and all(_is_text(part) for part in parts):
            return "\n".join(part["text"] for part in parts)
    raise ValueError('a string, or a list of {"type": "text", "text": ...}')


def _is_text(part: Any) -> bool:
    match part:
        case {"type": "text", "text": str()}:
            return True
    return False


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Message(_Body):
    """One turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None


class _Request(_Body):
    """What completions and chat completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)  # -1 and 0: all
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _stream_options_are_of_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream = true")
        return self

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report beside each one; None: no log probabilities."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return self.n

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt's own tokens are asked for."""
        return False

    def length(self, room: int) -> int:
        """Tokens to generate at most, where the context has `room` for so many more."""
        raise NotImplementedError

    def samplings(self, room: int) -> list[Sampling]:
        """One for each of the `n` answers; with a seed, each has one of its own."""
        return [
            Sampling(
                max_tokens=self.length(room),
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(0, self.top_k),
                min_p=self.min_p,
                seed=None if self.seed is None else (self.seed + choice) % 2**63,
                stop=tuple(self.stop),
                logprobs=self.alternatives,
                ignore_eos=self.ignore_eos,
                score_prompt=self.scores_prompt,
            )
            for choice in range(self.n)
        ]


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported, unless it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 would say nothing, unless with echo = true")
        if self.answers > MOST_CHOICES:
            raise ValueError(f"prompt: {_TOO_MANY}")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def answers(self) -> int:
        return len(self.prompt) * self.n

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None

    def length(self, room: int) -> int:
        if self.max_tokens is not None:
            return self.max_tokens
        return max(1, min(_COMPLETION_TOKENS, room))


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs = true")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def length(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(1, room)


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: bytes) -> R:
    """The request that a body holds.  Raises ApiError (400), with the part at fault."""
    try:
        read = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        return kind.model_validate(_supported(kind, read))
    except ValidationError as error:
        raise _refusal(error) from None


def _supported(kind: type[BaseModel], read: dict[str, Any]) -> dict[str, Any]:
    """The keys that are read here; null means that nothing was given."""
    given = {key: value for key, value in read.items() if value is not None}
    for key in given.keys() - kind.model_fields.keys() - _NO_EFFECT:
        if key not in _NOTHING_ASKED:
            raise ApiError(400, f"unknown key {key[:80]!r}{_nearest(kind, key)}", key[:80])
        if given[key] not in _NOTHING_ASKED[key]:
            raise ApiError(400, f"{key} is not supported", key)
    read_here = {key: value for key, value in given.items() if key in kind.model_fields}
    if isinstance(messages := read_here.get("messages"), list):
        read_here["messages"] = [_without_nulls(message) for message in messages]
    return read_here


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if part is not None}
    return value


def _nearest(kind: type[BaseModel], key: str) -> str:
    close = difflib.get_close_matches(key[:80], list(kind.model_fields), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _refusal(found: ValidationError) -> ApiError:
    """The first thing that is wrong, by the name under which it was sent."""
    error = found.errors(include_url=False, include_input=False)[0]
    place = [part for part in error["loc"] if not str(part).startswith(("list[", "function-"))]
    message = str(error.get("ctx", {}).get("error") or error["msg"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    if not param:
        param, _, message = message.partition(": ")
    return ApiError(400, f"{param}: {message}", param)


def to_json(value: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
