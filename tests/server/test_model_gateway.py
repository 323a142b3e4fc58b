"""The gateway in front of vLLM: what passes, what does not, and which version answers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_vllm import BASE, KEY
from hypothesis import given
from hypothesis import strategies as st
from registries import adapter
from vllm_stage import Stage, name_of, said_by, staged

from meadow.errors import ReplicaError
from meadow.loopback import loopback_names
from meadow.server.model_gateway import LARGEST_BODY, VERSION_HEADER, is_path
from meadow.server.registry_names import adapter_name, alias_name

Play = Callable[[Stage], Awaitable[None]]
JSON = {"Content-Type": "application/json"}


def play(root: Path, scene: Play, **options: Any) -> None:
    async def whole() -> None:
        async with staged(root, **options) as stage:
            stage.promote(1)
            assert await stage.settle()
            await scene(stage)

    asyncio.run(whole())


async def streamed(stage: Stage, **body: Any) -> tuple[str, str]:
    """A streamed answer: the version's header, and all its text."""
    asked = {"model": "mail", "prompt": "hi", "max_tokens": 20, "stream": True, **body}
    async with stage.session.post(f"{stage.gateway}/v1/completions", json=asked) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        lines = (await answer.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    words = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    return answer.headers[VERSION_HEADER], "".join(words)


# --- answers -------------------------------------------------------------------------------------


def test_an_alias_is_answered_by_its_version_and_says_which(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        digest = f"mail@sha256:{adapter(1).id[:20]}"
        for model in ("mail", "mail@prod", name_of(1), "mail@v1", digest):
            status, headers, answer = await stage.ask(model=model)
            assert (status, headers[VERSION_HEADER]) == (200, adapter(1).id)
            assert answer["choices"][0]["text"] == said_by(1, "hi", 3)
        status, headers, answer = await stage.ask(
            "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer["choices"][0]["message"]["content"] == said_by(1, "hi", 3)
        status, headers, answer = await stage.ask(model=BASE)
        assert (status, headers[VERSION_HEADER]) == (200, BASE)

    play(tmp_path, scene)


def test_a_stream_stays_with_its_version_while_the_alias_moves(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        go_on = asyncio.Event()
        for server in stage.servers:
            server.held = go_on
        running = asyncio.create_task(streamed(stage))
        while not stage.routes.running(name_of(1)):
            await asyncio.sleep(0)
        stage.promote(2)
        await stage.settle(2)
        stage.clock.now += 60
        await stage.settle(2)
        assert stage.loaded() == [{name_of(1), name_of(2)}] * 2, "somebody still listens to it"
        _, headers, answer = await stage.ask()
        assert headers[VERSION_HEADER] == adapter(2).id
        assert answer["choices"][0]["text"] == said_by(2, "hi", 3)
        go_on.set()
        assert await running == (adapter(1).id, said_by(1, "hi", 20))
        await stage.settle()
        assert stage.loaded() == [{name_of(2)}] * 2

    play(tmp_path, scene)


def test_during_many_swaps_nothing_fails_and_nothing_mixes(tmp_path: Path) -> None:
    """Clients ask without a pause while aliases move and a server is restarted."""

    async def scene(stage: Stage) -> None:
        ended = asyncio.Event()
        by_id = {adapter(number).id: number for number in (1, 2, 3)}
        seen: list[int] = []

        async def client() -> None:
            while not ended.is_set():
                version, text = await streamed(stage, max_tokens=5)
                assert text == said_by(by_id[version], "hi", 5)
                seen.append(by_id[version])

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for turn in range(12):
            stage.promote(1 + (turn + 1) % 3)
            stage.clock.now += 60
            if turn == 6:
                stage.servers[0].adapters.clear()  # as a restart, but for the port
            assert await stage.settle(2) or not stage.publisher.faults
        ended.set()
        await asyncio.gather(*clients)
        assert set(seen) == {1, 2, 3} and len(seen) > 20

    play(tmp_path, scene)


def test_models_are_listed_without_paths(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.session.get(f"{stage.gateway}/v1/models") as answer:
            text = await answer.text()
        cards = {card["id"]: card for card in json.loads(text)["data"]}
        assert cards.keys() == {BASE, "mail", "mail@prod"}
        assert cards["mail"]["parent"] == BASE
        assert cards["mail"]["adapter_version"] == adapter(1).id
        assert str(tmp_path) not in text and "/models" not in text

    play(tmp_path, scene)


# --- what does not pass --------------------------------------------------------------------------

DOORS = [
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/adapters"),
    ("DELETE", "/adapters/mail"),
    ("POST", "/invocations"),
    ("POST", "/v1/../adapters"),
    ("POST", "//adapters"),
    ("POST", "/v1/completions/../load_lora_adapter"),
    ("POST", "/v1/completions/"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("GET", "/v1/completions"),
    ("POST", "/%2e%2e/adapters"),
]


@pytest.mark.parametrize(("method", "path"), DOORS)
def test_other_paths_do_not_exist(tmp_path: Path, method: str, path: str) -> None:
    async def scene(stage: Stage) -> None:
        before = [len(server.log) for server in stage.servers]
        host = stage.gateway.removeprefix("http://")
        reader, writer = await asyncio.open_connection(*host.split(":"))
        body = b'{"name": "x", "src": "/etc", "lora_name": "x", "lora_path": "/etc"}'
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        assert answer.split()[1] in (b"404", b"405")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] in (404, 405)
        assert [len(server.log) for server in stage.servers] == before

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "/etc/adapters/a"}, 400, "model"),
        ({"model": "../a3"}, 400, "model"),
        ({"model": "mail/../../a3"}, 400, "model"),
        ({"model": "a\\b"}, 400, "model"),
        ({"model": "file:///x"}, 400, "model"),
        ({"model": "x" * 300}, 400, "model"),
        ({"model": ""}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"model": "unknown"}, 404, "model"),
        ({"model": "mail@canary"}, 404, "model"),
        ({"model": "mail@000000000000"}, 404, "model"),
        ({"model": "mail@v2"}, 404, "model"),
        ({"model": f"mail@sha256:{'0' * 12}"}, 404, "model"),
        ({"model": "other@v1"}, 404, "model"),
    ],
)
def test_models_that_are_none(
    tmp_path: Path, body: dict[str, Any], status: int, param: str
) -> None:
    async def scene(stage: Stage) -> None:
        before = [len(server.log) for server in stage.servers]
        found, _, answer = await stage.ask(**body)
        assert found == status and answer["error"]["param"] == param
        assert answer["error"]["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
        assert [len(server.log) for server in stage.servers] == before

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"", 400),
     (b'"' + b"x" * LARGEST_BODY + b'"', 413)],
)  # fmt: skip
def test_bodies_that_are_none(tmp_path: Path, data: bytes, status: int) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.session.post(
            f"{stage.gateway}/v1/completions", data=io.BytesIO(data), headers=JSON
        ) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["code"] == status

    play(tmp_path, scene)


def test_a_second_model_in_one_body_smuggles_nothing(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        data = b'{"model": "/etc/passwd", "prompt": "hi", "model": "mail", "max_tokens": 1}'
        where = f"{stage.gateway}/v1/completions"
        async with stage.session.post(where, data=data, headers=JSON) as answer:
            assert answer.status == 200
        asked = [body for server in stage.servers for _, _, body in server.log if body]
        assert {body["model"] for body in asked if "prompt" in body} == {name_of(1)}

    play(tmp_path, scene)


@given(st.text(max_size=40))
def test_no_name_of_an_adapter_or_alias_is_taken_for_a_path(text: str) -> None:
    for check in (adapter_name, alias_name):
        try:
            check(text)
        except Exception:
            continue
        assert not is_path(text)
    if text.startswith(("/", "../")) or "/../" in text:
        assert is_path(text)


# --- keys ----------------------------------------------------------------------------------------


def test_clients_have_keys_of_their_own_and_never_the_servers(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for sent in ("", "Bearer wrong", f"Bearer {KEY}", "Basic mine"):
            stage.headers = {"Authorization": sent} if sent else {}
            status, _, answer = await stage.ask()
            assert (status, answer["error"]["type"]) == (401, "AuthenticationError")
            async with stage.session.get(f"{stage.gateway}/v1/models") as models:
                assert models.status == 401
        stage.headers = {"Authorization": "Bearer mine", "X-Extra": "1"}
        status, headers, answer = await stage.ask()
        assert status == 200 and KEY not in str(headers) + str(answer)
        async with stage.session.get(f"{stage.gateway}/health") as health:
            assert (health.status, await health.text()) == (200, "")

    play(tmp_path, scene, keys=["other", "mine"])


# --- faults --------------------------------------------------------------------------------------


def test_a_server_that_just_lost_the_version_is_passed_over(tmp_path: Path) -> None:
    """Before the publisher has seen it; nobody notices."""

    async def scene(stage: Stage) -> None:
        stage.servers[0].adapters.clear()
        await stage.servers[1].stop()
        await stage.servers[1].start()
        status, headers, answer = await stage.ask()
        assert (status, headers["Retry-After"]) == (503, "1"), "none has it"
        await stage.settle()
        await stage.servers[0].stop()
        for _ in range(4):
            assert (await stage.ask())[0] == 200
        await stage.servers[1].stop()
        assert (await stage.ask())[0] == 503
        async with stage.session.get(f"{stage.gateway}/health") as health:
            assert health.status == 503

    play(tmp_path, scene)


async def hanging(stage: Stage, askers: int) -> list[asyncio.Task[tuple[int, Any, Any]]]:
    """All servers stop answering, and so many clients wait for them."""
    for server in stage.servers:
        server.hangs = True
    waiting = [asyncio.create_task(stage.ask()) for _ in range(askers)]
    while sum(replica.in_flight for replica in stage.replicas) < askers:
        await asyncio.sleep(0.01)
    return waiting


def test_who_waits_for_a_server_that_hangs_is_answered_by_another(tmp_path: Path) -> None:
    """It takes connections and says nothing: a look finds that out, long before the asker."""

    async def scene(stage: Stage) -> None:
        waiting = await hanging(stage, 4)
        assert [replica.in_flight for replica in stage.replicas] == [2, 2]
        stage.servers[1].hangs = False
        with pytest.raises(ReplicaError, match="gives no answer"):
            await stage.replicas[0].look()
        for status, _, answer in await asyncio.gather(*waiting):
            assert (status, answer["choices"][0]["text"]) == (200, said_by(1, "hi", 3))
        assert [replica.in_flight for replica in stage.replicas] == [0, 0]
        stage.servers[0].hangs = False

    play(tmp_path, scene)


def test_an_answer_that_only_one_server_can_give_is_waited_for(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        (waiting,) = await hanging(stage, 1)
        with pytest.raises(ReplicaError, match="gives no answer"):
            await stage.replicas[0].look()
        assert (await stage.ask())[0] == 503
        stage.servers[0].hangs = False
        assert (await waiting)[0] == 200

    play(tmp_path, scene, servers=1)


def test_who_goes_while_a_server_hangs_leaves_nothing_under_way(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        (waiting,) = await hanging(stage, 1)
        waiting.cancel()
        while stage.replicas[0].in_flight or stage.routes.running(name_of(1)):
            await asyncio.sleep(0.01)
        stage.servers[0].hangs = False
        assert (await stage.ask())[0] == 200

    play(tmp_path, scene, servers=1)


def test_an_error_of_the_server_is_passed_on(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for server in stage.servers:
            server.mute = True
        status, _, answer = await stage.ask()
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")

    play(tmp_path, scene)


def test_requests_spread_over_the_servers(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for server in stage.servers:
            server.log.clear()
            server.pace = 0.01
        await asyncio.gather(*(streamed(stage) for _ in range(6)))
        assert [len(server.log) for server in stage.servers] == [3, 3]

    play(tmp_path, scene)


def test_who_goes_away_in_the_middle_ends_the_request(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for server in stage.servers:
            server.pace = 0.05
        asked = {"model": "mail", "prompt": "hi", "max_tokens": 10_000, "stream": True}
        async with stage.session.post(f"{stage.gateway}/v1/completions", json=asked) as answer:
            await answer.content.readany()
            assert stage.routes.running(name_of(1)) == 1
            answer.close()
        while stage.routes.running(name_of(1)) or any(one.in_flight for one in stage.replicas):
            await asyncio.sleep(0.01)
        assert stage.replicas[0].ready == {name_of(1)}, "the server did nothing wrong"

    play(tmp_path, scene)


def test_an_answer_that_breaks_off_is_no_whole_answer(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        (server,) = stage.servers
        server.pace = 0.05
        running = asyncio.create_task(streamed(stage, max_tokens=1000))
        while not stage.replicas[0].in_flight:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await server.stop()
        with pytest.raises(aiohttp.ClientError):
            await running

    play(tmp_path, scene, servers=1)


# --- web pages -----------------------------------------------------------------------------------


def test_a_web_page_cannot_ask_by_a_name_or_a_kind_of_its_own(tmp_path: Path) -> None:
    """Of a gateway without keys on loopback: neither unasked (CSRF), nor by DNS rebinding."""

    async def scene(stage: Stage) -> None:
        before = [len(server.log) for server in stage.servers]
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            stage.headers = {"Content-Type": kind}
            status, _, answer = await stage.ask()
            assert (status, answer["error"]["type"]) == (415, "UnsupportedMediaTypeError")
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            stage.headers = {"Host": host}
            status, _, answer = await stage.ask()
            assert (status, answer["error"]["type"]) == (421, "MisdirectedRequestError")
        assert [len(server.log) for server in stage.servers] == before
        for host in ("localhost:99", "127.0.0.1", "LOCALHOST"):
            stage.headers = {"Host": host}
            assert (await stage.ask())[0] == 200

    play(tmp_path, scene, hosts=loopback_names("127.0.0.1"))
