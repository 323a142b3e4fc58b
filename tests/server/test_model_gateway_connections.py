"""Whoever opens connections to the gateway, and says nothing or nonsense, keeps nobody else out."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_stage import Stage, said_by, staged

from meadow.server import model_gateway_connections
from meadow.server.model_gateway_connections import Connections, most_connections

PATIENCE = 60.0
BODY = json.dumps({"model": "mail", "prompt": "hi", "max_tokens": 3}).encode()


def play(root: Path, scene: Callable[[Stage], Awaitable[None]], **options: Any) -> None:
    async def whole() -> None:
        async with staged(root, servers=1, keys=("mine",), **options) as stage:
            stage.headers = {"Authorization": "Bearer mine"}
            stage.promote(1)
            assert await stage.settle()
            await scene(stage)

    asyncio.run(whole())


class Caller:
    """One connection, by bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, stage: Stage) -> Caller:
        port = int(stage.gateway.rpartition(":")[2])
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hear(self) -> tuple[int, Any]:
        """Status and body of one answer."""
        async with asyncio.timeout(PATIENCE):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r")[0])
            return int(head.split()[1]), await self._reader.readexactly(length)

    async def is_hung_up_on(self) -> bool:
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._reader.read() == b""
            except ConnectionError:
                return True

    def close(self) -> None:
        self._writer.close()


def request(body: bytes = BODY, key: bytes = b"mine", *more: bytes, length: int = 0) -> bytes:
    head = [b"POST /v1/completions HTTP/1.1", b"Host: gateway", b"Authorization: Bearer " + key]
    head += [b"Content-Type: application/json", b"Content-Length: %d" % (length or len(body))]
    return b"\r\n".join([*head, *more, b"", body])


def test_bytes_that_are_no_text_are_no_key(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for key in (b"\xff", b"min\xc3", b"mine\xe2\x80"):
            caller = await Caller.of(stage)
            await caller.say(request(BODY, key))
            status, body = await caller.hear()
            assert status == 401 and json.loads(body)["error"]["type"] == "AuthenticationError"
            caller.close()

    play(tmp_path, scene)


def test_a_body_in_another_coding_than_it_says(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        bodies = {b"Content-Encoding: gzip": BODY, b"Content-Encoding: deflate": b"\x00" + BODY}
        for coding, sent in bodies.items():
            caller = await Caller.of(stage)
            await caller.say(request(sent, b"mine", coding))
            status, body = await caller.hear()
            assert status == 400 and json.loads(body)["error"]["message"] == "the body is not JSON"
            caller.close()
        caller = await Caller.of(stage)
        await caller.say(request(zlib.compress(BODY), b"mine", b"Content-Encoding: deflate"))
        assert (await caller.hear())[0] == 200
        caller.close()

    play(tmp_path, scene)


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        caller = await Caller.of(stage)
        await caller.say(request(length=10**6))
        status, body = await caller.hear()
        assert status == 408 and json.loads(body)["error"]["type"] == "RequestTimeoutError"
        caller.close()

    play(tmp_path, scene, body_seconds=0.1)


def test_who_waits_longest_makes_room(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.connections._most = 4
        silent = [await Caller.of(stage) for _ in range(12)]
        for caller in silent[:8]:
            assert await caller.is_hung_up_on()
        await silent[-1].say(request()[:40])  # a part of a head is no request
        last = await Caller.of(stage)
        await last.say(request())
        status, body = await last.hear()
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, said_by(1, "hi", 3))
        assert await silent[8].is_hung_up_on()
        more = [await Caller.of(stage) for _ in range(3)]  # who asked just now waits least
        for caller in silent[9:]:
            assert await caller.is_hung_up_on()
        await last.say(request())
        assert (await last.hear())[0] == 200
        for caller in (*silent, *more, last):
            caller.close()

    play(tmp_path, scene)


def test_where_all_are_busy_the_newest_is_turned_away(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        stage.connections._most = 2
        go_on = stage.servers[0].held = asyncio.Event()
        streamed = json.dumps({**json.loads(BODY), "stream": True}).encode()
        busy = [await Caller.of(stage) for _ in range(2)]
        for caller in busy:
            await caller.say(request(streamed))
        while stage.replicas[0].in_flight < 2:
            await asyncio.sleep(0.01)
        third = await Caller.of(stage)
        assert (await third.hear())[0] == 503 and await third.is_hung_up_on()
        third.close()
        go_on.set()
        for caller in busy:
            async with asyncio.timeout(PATIENCE):
                assert b"data: [DONE]" in await caller._reader.readuntil(b"[DONE]")
            caller.close()
        while stage.connections._busy or stage.connections._waiting:
            await asyncio.sleep(0.01)

    play(tmp_path, scene)


def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_gateway_connections, "IDLE_SECONDS", 0.2)

    async def scene(stage: Stage) -> None:
        silent, slow = await Caller.of(stage), await Caller.of(stage)
        await slow.say(request()[:40])
        for caller in (silent, slow):
            assert await caller.is_hung_up_on()
            caller.close()

    play(tmp_path, scene)


@pytest.mark.parametrize(("files", "most"), [(1024, 448), (65536, 32704), (64, 8), (-1, 65536)])
def test_half_the_files_are_for_the_servers(
    files: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda what: (files, files))
    assert most_connections() == most


def test_what_is_no_connection_of_ours_is_let_be() -> None:
    connections, stranger = Connections(1), object()
    with connections.busy(stranger):  # type: ignore[arg-type]
        assert not connections._busy
    connections.closed(stranger)  # type: ignore[arg-type]
