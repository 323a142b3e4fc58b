"""The routes on real sockets, over an engine that follows a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from loopback_server import Server
from scripted_serving import NEWS, failing, scripted_front, served
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from meadow.loopback import is_loopback, loopback_names
from meadow.server.serving import generation
from meadow.server.serving.api_keys import add_key
from meadow.server.serving.openai_types import parse
from meadow.server.serving.requests import Event, Finished, Job, Token

COMPLETION = {"model": "news", "prompt": "say b"}
CHAT = {"model": "news", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(scripted_front(largest_body=4096)) as server:
        yield server


def complete(server: Server, **more: Any) -> Any:
    reply = server.ask("/v1/completions", {**COMPLETION, **more})
    return reply.events if more.get("stream") else reply.json


def chat(server: Server, **more: Any) -> Any:
    reply = server.ask("/v1/chat/completions", {**CHAT, **more})
    return reply.events if more.get("stream") else reply.json


# --- answers -----------------------------------------------------------------------------------


def test_a_completion_says_everything(server: Server) -> None:
    told = complete(server, max_tokens=3, seed=1)
    assert told.pop("id").startswith("cmpl-") and told.pop("created") > 1_700_000_000
    assert told == {
        "object": "text_completion",
        "model": "news@v7",
        "system_fingerprint": NEWS.digest[:12],
        "choices": [{"index": 0, "text": "bcd", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }  # fmt: skip


def test_a_chat_says_everything(server: Server) -> None:
    told = chat(server, max_tokens=2)
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "ab", "refusal": None}
    (choice,) = told["choices"]
    assert choice == {
        "index": 0, "message": message, "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


def test_prompts_times_n_in_order_each_counted_once(server: Server) -> None:
    told = complete(server, prompt=["a", "bc"], n=2, max_tokens=2, seed=5, echo=True)
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in told["choices"]] == ["afg", "agh", "bcfg", "bcgh"]
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 + 3, 4 * 2)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    jobs = server.engine.jobs[-4:]
    assert [job.prompt for job in jobs] == [(0, 2), (0, 2), (0, 3, 4), (0, 3, 4)]
    assert [job.sampling.seed for job in jobs] == [5, 6, 5, 6]
    assert all(job.model == NEWS for job in jobs)


def test_the_answers_to_a_prompt_share_its_tokens(server: Server) -> None:
    """128 copies of a body's two million ids would be two gigabytes."""
    complete(server, prompt="abc", n=3, max_tokens=1)
    one, *others = server.engine.jobs[-3:]
    assert [job.prompt is one.prompt for job in others] == [True, True]


def test_a_large_body_is_read_while_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def watched(kind: Any, body: bytes) -> Any:
        threads.append(threading.current_thread())
        return parse(kind, body)

    monkeypatch.setattr(generation, "parse", watched)
    with served(scripted_front()) as server:
        for padding in ("", " " * 2**16):
            raw = json.dumps({**COMPLETION, "max_tokens": 1}) + padding
            assert server.ask("/v1/completions", raw=raw.encode()).status == 200
    loop, other = threads
    assert other is not loop


def test_prompts_of_token_ids_are_taken_as_they_are(server: Server) -> None:
    told = complete(server, prompt=[[3], [4, 1, 5]], max_tokens=1, echo=True)
    assert [job.prompt for job in server.engine.jobs[-2:]] == [(3,), (4, 1, 5)]
    assert [choice["text"] for choice in told["choices"]] == ["ba", "c da"]  # as they read


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_answer_names_its_version(server: Server, path: str) -> None:
    body = COMPLETION if path == "/v1/completions" else CHAT
    for stream in (False, True):
        reply = server.ask(path, {**body, "stream": stream, "max_tokens": 2})
        assert reply.headers["x-adapter-version"] == "news@v7"
        told = reply.events if stream else [reply.json]
        assert {(part["model"], part["system_fingerprint"]) for part in told} == {
            ("news@v7", NEWS.digest[:12])
        }
    reply = server.ask(path, {**body, "model": "tiny", "max_tokens": 1})
    assert reply.headers["x-adapter-version"] == "tiny"
    assert reply.json["system_fingerprint"] == "base"


def test_a_stream_of_completions(server: Server) -> None:
    events = complete(
        server, max_tokens=3, stream=True, echo=True, stream_options={"include_usage": True}
    )
    *chunks, last = events
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["say b", "a", "b", "c", ""]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * 4 + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    assert len({(event["id"], event["created"]) for event in events}) == 1


def test_a_stream_of_chats_begins_with_the_role_and_ends_with_the_reason(server: Server) -> None:
    events = chat(server, max_tokens=2, n=2, stream=True)
    for index in (0, 1):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["delta"] for choice in own[1:]] == [{"content": "a"}, {"content": "b"}, {}]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "length"]
    assert all("usage" not in event for event in events)


def held_back(job: Job) -> Iterator[Event]:
    """Half a character, then a possible stop string that was none."""
    yield Token(2, "")
    yield Token(3, "é")
    yield Token(4, "")
    yield Finished("stop", " end", len(job.prompt), 0, 3)


def test_what_was_held_back_comes_at_the_end() -> None:
    with served(scripted_front(held_back)) as server:
        assert complete(server)["choices"][0]["text"] == "é end"
        texts = [event["choices"][0]["text"] for event in complete(server, stream=True)]
        assert texts == ["é", " end"]
        deltas = [event["choices"][0]["delta"] for event in chat(server, stream=True)]
        assert deltas[1:] == [{"content": "é"}, {"content": " end"}]
        assert complete(server)["choices"][0]["finish_reason"] == "stop"


def test_probabilities_of_a_completion(server: Server) -> None:
    (choice,) = complete(server, max_tokens=2, logprobs=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "b"], "token_logprobs": [-0.25, -0.25], "text_offset": [0, 1],
        "top_logprobs": [{"a": -0.25, "b": -1.5}, {"b": -0.25, "c": -1.5}],
    }  # fmt: skip
    (choice,) = complete(server, max_tokens=2, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    events = complete(server, max_tokens=2, logprobs=1, stream=True)
    offsets = [e["choices"][0]["logprobs"]["text_offset"] for e in events[:-1]]
    assert offsets == [[0], [1]] and events[-1]["choices"][0]["logprobs"] is None


def test_probabilities_of_a_chat(server: Server) -> None:
    (choice,) = chat(server, max_tokens=1, logprobs=True, top_logprobs=2)["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert entry == {
        "token": "a", "logprob": -0.25, "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }  # fmt: skip
    events = chat(server, max_tokens=1, logprobs=True, stream=True)
    (entry,) = events[1]["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "a" and entry["top_logprobs"] == []


def unlikely(job: Job) -> Iterator[Event]:
    yield Token(2, "a", float("-inf"), ((3, float("-inf")),))
    yield Finished("stop", "", 1, 0, 1)


def test_an_impossible_tokens_probability_is_json() -> None:
    with served(scripted_front(unlikely)) as server:
        reply = server.ask("/v1/completions", {**COMPLETION, "logprobs": 1})
        assert reply.json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
        assert b"Infinity" not in reply.body


def test_token_ids_where_they_are_wanted(server: Server) -> None:
    (choice,) = complete(server, max_tokens=2, return_token_ids=True)["choices"]
    assert choice["token_ids"] == [2, 3] and choice["prompt_token_ids"] == [0, 20, 2, 26, 28, 3]
    told = chat(server, max_tokens=2, return_token_ids=True)
    assert told["choices"][0]["token_ids"] == [2, 3]
    assert told["prompt_token_ids"][:3] == [0, 9, 10]  # <s>, h, i, and the end of the line
    first, *rest = complete(server, max_tokens=2, return_token_ids=True, stream=True)
    assert first["choices"][0]["prompt_token_ids"] == [0, 20, 2, 26, 28, 3]
    assert [event["choices"][0]["token_ids"] for event in rest] == [[2], [3], []]
    first, *_ = chat(server, max_tokens=2, return_token_ids=True, stream=True)
    assert first["prompt_token_ids"] == told["prompt_token_ids"]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["other", "/etc/passwd", "../a3", "news@v99", "a" * 256])
def test_an_unknown_model_is_404(server: Server, model: str) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        reply = server.ask(path, {**body, "model": model})
        assert reply.status == 404
        assert (reply.error["type"], reply.error["param"]) == ("NotFoundError", "model")


def test_bad_requests_are_400(server: Server) -> None:
    for raw in (b"{", b"", b"\xff\xfe", b"[]", b"[" * 4000, b'{"model": "news"}'):
        reply = server.ask("/v1/completions", raw=raw)
        assert reply.status == 400 and reply.error["type"] == "BadRequestError"


def test_too_long_is_400_with_the_limit(server: Server) -> None:
    for body in ({**COMPLETION, "max_tokens": 65}, {**COMPLETION, "prompt": "a" * 64}):
        reply = server.ask("/v1/completions", body)
        assert reply.status == 400 and "64 tokens" in reply.error["message"]
    reply = server.ask("/v1/chat/completions", {**CHAT, "max_completion_tokens": 64})
    assert reply.status == 400 and "64 tokens" in reply.error["message"]


@pytest.mark.parametrize("size", [4097, 9000, 200_000])
def test_too_large_is_413(server: Server, size: int) -> None:
    reply = server.ask("/v1/completions", raw=b" " * size)
    assert reply.status == 413 and "4096 bytes" in reply.error["message"]
    assert reply.headers["connection"] == "close"
    asking = {"Expect": "100-continue", "Content-Length": str(size)}
    assert server.ask("/v1/completions", raw=b"", headers=asking).status == 413


def test_what_is_no_json_by_its_own_word_is_415(server: Server) -> None:
    """A web page may send text/plain anywhere without being asked for leave."""
    body = json.dumps(COMPLETION).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = server.ask("/v1/completions", raw=body, headers={"Content-Type": kind})
        assert reply.status == 415 and reply.error["type"] == "UnsupportedMediaTypeError"
    with_charset = {"Content-Type": "application/json; charset=utf-8"}
    assert server.ask("/v1/completions", raw=body, headers=with_charset).status == 200


def test_other_routes_and_methods_are_refused_in_the_same_shape(server: Server) -> None:
    assert server.ask("/v1/nothing").error["type"] == "NotFoundError"
    assert server.ask("/v1/completions").error["type"] == "MethodNotAllowedError"
    for path in ("/docs", "/openapi.json", "/redoc", "/v1/load_lora_adapter", "/adapters"):
        assert server.ask(path, {}).status == 404 and server.ask(path).status == 404


def test_a_full_queue_is_429_and_lets_go_of_what_was_taken() -> None:
    with served(scripted_front()) as server:
        server.engine.pace = threading.Semaphore(0)
        server.engine.room = 2
        reply = server.ask("/v1/completions", {**COMPLETION, "n": 3})
        assert reply.status == 429 and reply.headers["retry-after"] == "3"
        assert reply.error["type"] == "RateLimitError"
        assert all(ticket.cancelled.is_set() for ticket in server.engine.tickets)
        assert server.catalogue.leases[-1].released.wait(60)
        server.engine.pace, server.engine.room = None, 1
        assert complete(server, max_tokens=1)["choices"][0]["text"] == "a"


def test_a_fault_of_the_engine_is_500_and_tells_no_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served(scripted_front(failing("/srv/secret broke"))) as server:
        reply = server.ask("/v1/completions", COMPLETION)
        assert reply.status == 500 and reply.error["type"] == "InternalServerError"
        assert b"secret" not in reply.body
        *_, last = complete(server, stream=True)
        assert last["error"]["code"] == 500 and "secret" not in str(last)
    assert caplog.text.count("/srv/secret broke") == 2


# --- keys --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {
        "ada": add_key(path, "ada", ["inference"]),
        "admin": add_key(path, "admin", ["admin"]),
        "slow": add_key(path, "slow", ["inference"], per_minute=2),
        "one": add_key(path, "one", ["inference"], at_once=1),
    }
    with served(scripted_front(keys=path)) as server:
        yield server, keys


ROUTES: list[tuple[str, Any, str]] = [
    ("/v1/models", None, "inference"),
    ("/v1/models/news", None, "inference"),
    ("/v1/completions", COMPLETION, "inference"),
    ("/v1/chat/completions", CHAT, "inference"),
    ("/metrics", None, "admin"),
    ("/admin/status", None, "admin"),
]


@pytest.mark.parametrize(("path", "body", "scope"), ROUTES)
def test_no_route_is_open_but_health(
    keyed: tuple[Server, dict[str, str]], path: str, body: Any, scope: str
) -> None:
    server, keys = keyed
    right, wrong = ("ada", "admin") if scope == "inference" else ("admin", "ada")
    for key in ("", "mdw_x_y", keys["ada"][:-1], "not a key"):
        reply = server.ask(path, body, key=key)
        assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert reply.error["type"] == "AuthenticationError"
    reply = server.ask(path, body, key=keys[wrong])
    assert reply.status == 403 and reply.error["type"] == "PermissionDeniedError"
    assert server.ask(path, body, key=keys[right]).status == 200
    assert server.ask("/health").status == 200


def test_every_route_is_in_that_list() -> None:
    from meadow.server.serving.api import application

    routes = {getattr(route, "path", "") for route in application(scripted_front()).routes}
    told = {path for path, _, _ in ROUTES} - {"/v1/models/news"}
    assert routes == told | {"/v1/models/{model:path}", "/health"}


def test_a_tenant_is_its_key(keyed: tuple[Server, dict[str, str]]) -> None:
    server, keys = keyed
    for name in ("ada", "one"):
        assert server.ask("/v1/completions", COMPLETION, key=keys[name]).status == 200
        assert server.engine.jobs[-1].tenant == keys[name].split("_")[1]


def test_a_keys_rate_is_429(keyed: tuple[Server, dict[str, str]]) -> None:
    server, keys = keyed
    told = [server.ask("/v1/completions", COMPLETION, key=keys["slow"]) for _ in range(3)]
    assert [reply.status for reply in told] == [200, 200, 429]
    assert 0 < int(told[2].headers["retry-after"]) <= 30
    assert told[2].error["type"] == "RateLimitError"


def test_a_keys_place_is_free_again_when_its_answer_has_ended(
    keyed: tuple[Server, dict[str, str]],
) -> None:
    server, keys = keyed
    assert server.ask("/v1/completions", {**COMPLETION, "n": 2}, key=keys["one"]).status == 400
    for body in (COMPLETION, {"model": "x", "prompt": "a"}, {"model": 1}, COMPLETION):
        assert server.ask("/v1/completions", body, key=keys["one"]).status != 429


# --- names -------------------------------------------------------------------------------------


def test_without_keys_only_loopbacks_names_are_answered() -> None:
    """Or a web page could bring its own name to point here."""
    with served(scripted_front(hosts=loopback_names("127.0.0.1"))) as server:
        for host in ("127.0.0.1", "localhost:99", "LOCALHOST", "[::1]:8000"):
            assert server.ask("/health", headers={"Host": host}).status == 200
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", ""):
            reply = server.ask("/v1/models", headers={"Host": host})
            assert reply.status == 421 and reply.error["type"] == "MisdirectedRequestError"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_loopback_is(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_defect_is_500_in_the_same_shape() -> None:
    front = scripted_front()
    front.prompts = None  # type: ignore[assignment]
    with served(front) as server:
        reply = server.ask("/v1/completions", COMPLETION)
        assert reply.status == 500 and reply.error["type"] == "InternalServerError"


def test_a_keys_rate_counts_whatever_it_asks_for(keyed: tuple[Server, dict[str, str]]) -> None:
    """To be told of a version is to have it verified."""
    server, keys = keyed
    path = server.front.tenants._path
    assert path is not None
    key = add_key(path, "curious", ["inference"], per_minute=2)
    told = [server.ask(f"/v1/models{more}", key=key) for more in ("", "/news@v7", "/news", "")]
    assert [reply.status for reply in told] == [200, 200, 429, 429]
    assert keys


def test_a_prompts_own_probabilities_are_echoed(server: Server) -> None:
    asked = {"prompt": "say b", "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2, "seed": 0}
    for choice, said in zip(complete(server, **asked)["choices"], "ab", strict=True):
        assert choice["text"] == "say b" + said and "token_ids" not in choice
        assert choice["logprobs"] == {
            "tokens": ["<s>", "s", "a", "y", " ", "b", said],
            "token_logprobs": [None, *[-0.5] * 5, -0.25],
            "top_logprobs": [None, *({letter: -0.5} for letter in "say b"), {said: -0.25}],
            "text_offset": [0, 0, 1, 2, 3, 4, 5],
        }
    events = complete(server, **asked, stream=True, return_token_ids=True)
    own = [event["choices"][0] for event in events if event["choices"][0]["index"] == 0]
    assert [choice["text"] for choice in own] == ["say b", "a", ""]
    assert own[0]["logprobs"]["tokens"] == ["<s>", "s", "a", "y", " ", "b"]
    assert own[0]["prompt_token_ids"] == [0, 20, 2, 26, 28, 3] and own[0]["token_ids"] == []
    assert own[1]["logprobs"]["text_offset"] == [5] and own[1]["token_ids"] == [2]


def test_a_prompt_can_be_scored_and_nothing_generated(server: Server) -> None:
    told = complete(server, echo=True, logprobs=0, max_tokens=0)
    assert told["choices"][0]["text"] == "say b" and told["usage"]["completion_tokens"] == 0
    assert told["choices"][0]["logprobs"]["token_logprobs"] == [None, *[-0.5] * 5]
    assert told["choices"][0]["finish_reason"] == "length"
    assert complete(server, echo=True, max_tokens=0)["choices"][0]["logprobs"] is None


def test_offsets_are_places_in_the_text_that_is_echoed() -> None:
    """Of which a first token's space is no part."""
    words = {"<unk>": 0, "\u2581a": 1, "\u2581dog": 2, "s": 3}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    with served(scripted_front(words=tokenizer)) as server:
        asked = {"prompt": [[1, 0, 2, 3]], "echo": True, "logprobs": 0, "max_tokens": 1}
        (choice,) = complete(server, **asked)["choices"]
    assert choice["text"].startswith("a dogs")
    assert choice["logprobs"]["tokens"] == [" a", "<unk>", " dog", "s", " dog"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 5, 6]
