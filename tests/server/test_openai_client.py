"""The official client against a server on loopback: what its users do, as they do it.

The engine follows a script here; `test_serve.py` has the same client with the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from loopback_server import PATIENCE, Server
from openai import OpenAI
from scripted_serving import NEWS, failing, scripted_front, served

from meadow.server.serving.api_keys import add_key
from meadow.server.serving.requests import Event, Finished, Job, Token

FINGERPRINT = NEWS.digest[:12]
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, add_key(path, "ada", ["inference"])


@pytest.fixture(scope="module")
def server(key: tuple[Path, str]) -> Iterator[Server]:
    with served(scripted_front(keys=key[0])) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server, key: tuple[Path, str]) -> Iterator[OpenAI]:
    with connected(server, key[1]) as client:
        yield client


def connected(server: Server, key: str = "none", retries: int = 0) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=key, max_retries=retries, timeout=PATIENCE)


# --- models ------------------------------------------------------------------------------------


def test_models_are_listed(client: OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny", "news"]
    assert {model.object for model in models} == {"model"}
    assert models[1].created == 1_800_000_000 and models[1].owned_by == "meadow"
    assert models[1].to_dict()["version"] == "v7"


def test_a_model_is_retrieved(client: OpenAI) -> None:
    assert client.models.retrieve("news").id == "news"
    assert client.models.retrieve("news@v7").to_dict()["digest"] == NEWS.digest
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tenant/other")


# --- completions -------------------------------------------------------------------------------


def test_a_completion(client: OpenAI) -> None:
    told = client.completions.create(model="news", prompt="say", max_tokens=4)
    assert told.object == "text_completion" and told.model == "news@v7"
    assert told.system_fingerprint == FINGERPRINT
    assert told.choices[0].text == "abcd" and told.choices[0].finish_reason == "length"
    assert told.usage is not None and told.usage.completion_tokens == 4
    assert told.usage.total_tokens == told.usage.prompt_tokens + 4


def test_completions_of_several_prompts_and_n(client: OpenAI) -> None:
    told = client.completions.create(
        model="news", prompt=["a", "bb"], n=2, max_tokens=2, seed=3, echo=True
    )
    assert [choice.text for choice in told.choices] == ["ade", "aef", "bbde", "bbef"]
    ids = client.completions.create(model="news", prompt=[[2, 3], [4]], max_tokens=1)
    assert len(ids.choices) == 2 and ids.usage is not None and ids.usage.prompt_tokens == 3


def test_a_completions_probabilities(client: OpenAI) -> None:
    told = client.completions.create(model="news", prompt="a", max_tokens=2, logprobs=2)
    found = told.choices[0].logprobs
    assert found is not None and found.tokens == ["a", "b"]
    assert found.token_logprobs == [-0.25, -0.25] and found.text_offset == [0, 1]
    assert found.top_logprobs == [{"a": -0.25, "b": -1.5}, {"b": -0.25, "c": -1.5}]


def test_a_stream_of_completions(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="news", prompt="a", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"
    reasons = [str(chunk.choices[0].finish_reason) for chunk in chunks]
    assert reasons == ["None", "None", "None", "length"]
    assert {chunk.system_fingerprint for chunk in chunks} == {FINGERPRINT}


def test_a_streams_usage(client: OpenAI) -> None:
    *chunks, last = client.completions.create(
        model="news", prompt="a", max_tokens=3, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 3


def test_sampling_reaches_the_engine(client: OpenAI, server: Server) -> None:
    client.completions.create(
        model="news", prompt="a", max_tokens=2, temperature=0.5, top_p=0.25, seed=9,
        stop=["x", "yy"], extra_body={"top_k": 3, "min_p": 0.125, "ignore_eos": True},
    )  # fmt: skip
    asked = server.engine.jobs[-1].sampling
    assert (asked.temperature, asked.top_p, asked.seed, asked.stop) == (0.5, 0.25, 9, ("x", "yy"))
    assert (asked.top_k, asked.min_p, asked.ignore_eos) == (3, 0.125, True)


def test_token_ids_as_an_extension(client: OpenAI) -> None:
    told = client.completions.create(
        model="news", prompt="a", max_tokens=2, extra_body={"return_token_ids": True}
    )
    assert told.choices[0].to_dict()["token_ids"] == [2, 3]


# --- chat --------------------------------------------------------------------------------------


def test_a_chat(client: OpenAI) -> None:
    told = client.chat.completions.create(model="news@prod", messages=HI, max_completion_tokens=3)
    assert told.object == "chat.completion" and told.model == "news@v7"
    (choice,) = told.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "abc")
    assert choice.finish_reason == "length" and told.system_fingerprint == FINGERPRINT


def test_roles_and_parts(client: OpenAI) -> None:
    told = client.chat.completions.create(
        model="news",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "ada"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        max_tokens=1,
        n=2,
    )
    assert [choice.message.content for choice in told.choices] == ["a", "a"]


def test_a_stream_of_chats(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="news", messages=HI, max_tokens=3, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    first, *rest, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == "abc"
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 3


def ends(job: Job) -> Iterator[Event]:
    yield Token(2, "a")
    yield Finished("stop", "b", len(job.prompt), 0, 2)


def test_the_clients_own_stream_helper() -> None:
    """It puts the chunks together again, and is strict about their order."""
    with served(scripted_front(ends)) as server, connected(server) as client:
        with client.chat.completions.stream(model="news", messages=HI) as stream:
            kinds = {event.type for event in stream}
            told = stream.get_final_completion()
    assert "content.delta" in kinds and told.choices[0].message.content == "ab"


def test_a_chats_probabilities(client: OpenAI) -> None:
    told = client.chat.completions.create(
        model="news", messages=HI, max_tokens=2, logprobs=True, top_logprobs=2
    )
    found = told.choices[0].logprobs
    assert found is not None and found.content is not None
    assert [entry.token for entry in found.content] == ["a", "b"]
    assert found.content[0].bytes == [97] and found.content[0].logprob == -0.25
    assert [other.token for other in found.content[0].top_logprobs] == ["a", "b"]


def test_raw_answers_show_the_version(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="news", messages=HI, max_tokens=1)
    assert raw.headers["x-adapter-version"] == "news@v7"
    with client.completions.with_streaming_response.create(
        model="news", prompt="a", max_tokens=1, stream=True
    ) as streaming:
        assert streaming.headers["x-adapter-version"] == "news@v7"
        assert [line for line in streaming.iter_lines() if line][-1] == "data: [DONE]"


def test_leaving_a_stream_early_frees_the_engine(key: tuple[Path, str]) -> None:
    front = scripted_front(keys=key[0])
    front.engine.pace = threading.Semaphore(2)  # type: ignore[attr-defined]
    with served(front) as server, connected(server, key[1]) as client:
        with client.completions.create(
            model="news", prompt="a", max_tokens=30, stream=True
        ) as stream:
            assert next(iter(stream)).choices[0].text == "a"
        assert server.engine.tickets[0].cancelled.wait(PATIENCE)


# --- errors ------------------------------------------------------------------------------------


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HI)
    assert (caught.value.param, caught.value.type) == ("model", "NotFoundError")
    assert caught.value.code == "404"
    assert isinstance(caught.value.body, dict) and "other" in caught.value.body["message"]


def test_bad_requests(client: OpenAI) -> None:
    bad: list[dict[str, Any]] = [
        {"temperature": 3}, {"max_tokens": 10**6}, {"max_tokens": 0}, {"n": 0}, {"stop": [""]},
        {"extra_body": {"temprature": 1}}, {"tools": [{"type": "function"}]},
    ]  # fmt: skip
    for more in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="news", messages=HI, **more)
        assert caught.value.type == "BadRequestError"


def test_wrong_keys(server: Server, key: tuple[Path, str]) -> None:
    with connected(server, "mdw_0_0") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    rules = add_key(key[0], "rules", ["admin"])
    with connected(server, rules) as admin, pytest.raises(openai.PermissionDeniedError):
        admin.completions.create(model="news", prompt="a")


def test_overload_is_tried_again_by_the_client(key: tuple[Path, str]) -> None:
    with served(scripted_front(keys=key[0])) as server:
        server.engine.room = 0
        with connected(server, key[1]) as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="news", prompt="a")
        assert caught.value.response.headers["retry-after"] == "3"


def test_a_fault_within_a_stream(key: tuple[Path, str]) -> None:
    with served(scripted_front(failing(), keys=key[0])) as server:
        with connected(server, key[1]) as client:
            stream = client.completions.create(model="news", prompt="a", stream=True)
            assert next(stream).choices[0].text == "a"
            with pytest.raises(openai.APIError) as caught:
                next(stream)
            assert caught.value.type == "InternalServerError"
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model="news", prompt="a")


def test_a_server_that_leaves(key: tuple[Path, str]) -> None:
    front = scripted_front(keys=key[0])
    front.engine.pace = threading.Semaphore(1)  # type: ignore[attr-defined]
    with served(front) as server, connected(server, key[1]) as client:
        stream = client.completions.create(model="news", prompt="a", max_tokens=3, stream=True)
        assert next(stream).choices[0].text == "a"
        server.leave()
        while not front.doorway.leaving:
            pass
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="news", prompt="a")
        assert caught.value.status_code == 503
        server.engine.pace.release(10)
        assert "".join(chunk.choices[0].text for chunk in stream) == "bc"
