"""What may be asked, and how what may not be is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.server.serving.openai_errors import ApiError
from meadow.server.serving.openai_types import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    parse,
)

COMPLETION = {"model": "m", "prompt": "say a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def completion(**more: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({**COMPLETION, **more}).encode())


def chat(**more: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**CHAT, **more}).encode())


def refused(**more: Any) -> ApiError:
    """How a completion is refused, or a chat where there are messages."""
    with pytest.raises(ApiError) as caught:
        chat(**more) if "messages" in more or "top_logprobs" in more else completion(**more)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], [1, [2]], [True], [1.0], [-1], [2**31], {}, 3])
def test_other_forms_are_refused(prompt: Any) -> None:
    error = refused(prompt=prompt)
    assert error.param == "prompt" and "a list of token ids" in error.message


@pytest.mark.parametrize("one", ["a", [1], {}])
def test_too_many_prompts_are_refused_before_each_is_looked_at(one: Any) -> None:
    """A body of 4 MB holds a million: the loop stood still for seconds."""
    error = refused(prompt=[one] * (MOST_CHOICES + 1))
    assert (error.param, error.message) == ("prompt", "prompt: prompts times n, at most 128")


def test_defaults_are_openais() -> None:
    (plain,) = completion().samplings(1000)
    assert (plain.max_tokens, plain.temperature, plain.top_p, plain.seed) == (16, 1.0, 1.0, None)
    assert (plain.stop, plain.logprobs, plain.ignore_eos) == ((), None, False)
    assert chat().samplings(1000)[0].max_tokens == 1000  # as much as there is room for
    assert completion().samplings(7)[0].max_tokens == 7
    assert completion().samplings(-3)[0].max_tokens == 1  # the engine says that it is too long


def test_all_that_is_asked_reaches_the_engine() -> None:
    asked = completion(
        n=3, max_tokens=5, temperature=0, top_p=0.5, top_k=7, min_p=0.25, seed=2**63 - 2,
        stop="end", logprobs=4, ignore_eos=True,
    )  # fmt: skip
    one, two, three = asked.samplings(1000)
    assert (one.max_tokens, one.temperature, one.top_p, one.top_k) == (5, 0.0, 0.5, 7)
    assert (one.min_p, one.stop, one.logprobs, one.ignore_eos) == (0.25, ("end",), 4, True)
    assert (one.seed, two.seed, three.seed) == (2**63 - 2, 2**63 - 1, 0)
    assert completion(seed=-1).samplings(1)[0].seed == 2**63 - 1
    assert completion(top_k=-1).samplings(1)[0].top_k == 0


def test_a_chats_probabilities_and_lengths() -> None:
    assert chat(logprobs=True).alternatives == 0
    assert chat(logprobs=True, top_logprobs=3).alternatives == 3
    assert chat().alternatives is None
    assert chat(max_tokens=3).length(9) == 3
    assert chat(max_tokens=3, max_completion_tokens=4).length(9) == 4
    assert refused(top_logprobs=3).message == "top_logprobs: only with logprobs = true"


def test_null_is_as_good_as_nothing() -> None:
    assert completion(**dict.fromkeys(["stop", "seed", "logprobs", "user", "suffix"])).stop == []
    turn = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}
    assert chat(messages=[turn]).messages[0].content == "x"


def test_what_changes_nothing_is_taken_and_what_would_is_refused() -> None:
    completion(user="me", metadata={"a": "b"}, presence_penalty=0, repetition_penalty=1.0)
    chat(tools=[], tool_choice="auto", response_format={"type": "text"}, logit_bias={})
    assert refused(presence_penalty=0.5).message == "presence_penalty is not supported"
    assert refused(suffix="x").param == "suffix"
    assert refused(messages=CHAT["messages"], tools=[{"type": "function"}]).param == "tools"
    assert completion(n=2, best_of=2).n == 2
    assert refused(best_of=2).message == "best_of: not supported, unless it equals n"
    assert completion(echo=True, logprobs=1).samplings(9)[0].score_prompt
    assert not completion(echo=True).samplings(9)[0].score_prompt
    assert completion(echo=True, max_tokens=0).samplings(9)[0].max_tokens == 0
    assert chat(stream=True, stream_options={"include_obfuscation": False}).stream


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    error = refused(temprature=1)
    assert error.message == "unknown key 'temprature'; did you mean temperature?"
    assert error.param == "temprature"
    assert refused(zzz=1).message == "unknown key 'zzz'"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 513}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"model": ""}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio"),
    ],
)  # fmt: skip
def test_the_part_at_fault_is_named(more: dict[str, Any], param: str) -> None:
    error = refused(**more)
    assert error.param == param and error.message.startswith(f"{param}: ")


def test_a_messages_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": parts}])
    assert asked.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 10**5, b'{"model": NaN}', b'{"a": "\\ud800"}'],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert caught.value.status == 400 and caught.value.message.startswith("the body is not")


def test_a_refusal_that_quotes_much_is_short() -> None:
    assert len(refused(**{"k" * 10**5: 1}).message) < 200


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(
    sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools"})
)


@settings(deadline=None)
@given(more=st.dictionaries(KEYS, ANY, max_size=4), kind=st.sampled_from(["completion", "chat"]))
def test_any_json_is_a_request_or_refused(more: dict[str, Any], kind: str) -> None:
    body = {**(COMPLETION if kind == "completion" else CHAT), **more}
    try:
        if kind == "completion":
            parse(CompletionRequest, json.dumps(body).encode()).samplings(10)
        else:
            parse(ChatRequest, json.dumps(body).encode()).samplings(10)
    except ApiError as error:
        assert error.status == 400 and error.message
        json.dumps(error.body())
