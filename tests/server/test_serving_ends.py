"""How answers and servers end: clients that hang up, and a server that is asked to leave."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from loopback_server import PATIENCE, Server
from scripted_serving import ScriptedLease, scripted_front, served, spelled

from meadow.server.serving import http_server
from meadow.server.serving.api_keys import add_key
from meadow.server.serving.requests import Event, Finished, Job, Token

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = {"model": "news", "prompt": "a", "max_tokens": 30}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Caller:
    """A client that is told by its test when to read and when to go."""

    def __init__(self, server: Server, body: dict[str, Any], key: str = "") -> None:
        data = json.dumps(body).encode()
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        self.socket = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        self.socket.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        self.heard = b""

    def until(self, text: bytes) -> bytes:
        while text not in self.heard:
            more = self.socket.recv(65536)
            assert more, self.heard
            self.heard += more
        return self.heard

    def rest(self) -> bytes:
        with self.socket:
            while more := self.socket.recv(65536):
                self.heard += more
        return self.heard

    def hang_up(self) -> None:
        self.socket.close()


def slow_server(**options: Any) -> Any:
    """Nothing is said before its test says so."""
    front = scripted_front(**options)
    front.engine.pace = threading.Semaphore(0)  # type: ignore[attr-defined]
    return front


def let(server: Server, events: int) -> None:
    assert server.engine.pace is not None
    server.engine.pace.release(events)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_everything(stream: bool, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "ada", ["inference"], at_once=2)
    with served(slow_server(keys=path)) as server:
        caller = Caller(server, {**LONG, "stream": stream, "n": 2}, key)
        if stream:
            let(server, 3)
            caller.until(b'"text":"c"')
        eventually(lambda: len(server.engine.tickets) == 2)
        assert not any(ticket.cancelled.is_set() for ticket in server.engine.tickets)
        assert not server.catalogue.leases[0].released.is_set()
        caller.hang_up()
        for ticket in server.engine.tickets:
            assert ticket.cancelled.wait(PATIENCE)
        assert server.catalogue.leases[0].released.wait(PATIENCE)
        eventually(lambda: server.front.doorway.in_flight == 0)
        server.engine.pace = None
        again = server.ask("/v1/completions", {**LONG, "n": 2}, key=key)
        assert again.status == 200  # both of its places are free
        assert server.front.meters.finished == {"abort": 2, "length": 2}


def test_one_that_hangs_up_leaves_the_others_alone() -> None:
    with served(slow_server()) as server:
        first = Caller(server, {**LONG, "stream": True})
        let(server, 1)
        first.until(b'"text":"a"')
        second = Caller(server, {**LONG, "stream": True, "max_tokens": 2})
        eventually(lambda: len(server.engine.tickets) == 2)
        first.hang_up()
        assert server.engine.tickets[0].cancelled.wait(PATIENCE)
        let(server, 10)
        assert b'"finish_reason":"length"' in second.until(b"[DONE]")
        assert not server.engine.tickets[1].cancelled.is_set()
        second.hang_up()


def test_a_body_that_does_not_come_is_408() -> None:
    with served(scripted_front(body_seconds=0.05)) as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            heard = b""
            while more := slow.recv(65536):  # the connection ends with the answer
                heard += more
        assert heard.startswith(b"HTTP/1.1 408") and b"RequestTimeoutError" in heard


def test_heads_without_end_are_refused() -> None:
    with served(scripted_front()) as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as flood:
            flood.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
            heard = b""
            with suppress(OSError):  # it may hang up while we still send
                for _ in range(64):
                    flood.sendall(b"x" * 16384)
                while more := flood.recv(65536):
                    heard += more
        assert heard.startswith(b"HTTP/1.1 4") or not heard
        assert server.front.doorway.in_flight == 0 and not server.front.meters.answers


def opened(server: Server, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    connection.sendall(said)
    return connection


def ended(connection: socket.socket) -> bool:
    """Whether the server hangs up; it says nothing before."""
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    connection.close()
    return True


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", HEALTH])
def test_a_head_that_does_not_come_ends_its_connection(said: bytes) -> None:
    """Neither the first one of a connection, nor one after an answer; a byte now and then is no
    head."""
    with served(scripted_front(head_seconds=0.3)) as server:
        slow = opened(server, said)
        if said == HEALTH:
            while b"\r\n\r\n" not in slow.recv(65536):
                pass
            slow.sendall(b"GET /hea")
        with suppress(OSError):
            while not select.select([slow], [], [], 0.05)[0]:
                slow.sendall(b"x")
        assert ended(slow)
        assert server.ask("/health").status == 200


def test_a_long_answer_is_no_late_head() -> None:
    with served(slow_server(head_seconds=0.2)) as server:
        caller = Caller(server, {**LONG, "stream": True, "max_tokens": 4})
        for _ in range(4):
            time.sleep(0.1)  # the head's time is over before the answer is
            let(server, 1)
        let(server, 4)
        assert b'"finish_reason":"length"' in caller.until(b"[DONE]")
        caller.hang_up()


def test_of_too_many_connections_the_one_that_waited_longest_goes() -> None:
    with served(slow_server(connections=3)) as server:
        busy = Caller(server, {**LONG, "stream": True, "max_tokens": 2})
        eventually(lambda: len(server.engine.tickets) == 1)
        silent = [opened(server)]
        eventually(lambda: len(server.http.server_state.connections) == 2)
        silent.append(opened(server))
        eventually(lambda: len(server.http.server_state.connections) == 3)
        assert server.ask("/health").status == 200
        assert ended(silent[0])
        let(server, 5)
        assert b'"finish_reason":"length"' in busy.until(b"[DONE]")
        for connection in (busy.socket, silent[1]):
            connection.close()


def test_where_all_connections_are_busy_the_next_one_is_told_to_come_back() -> None:
    with served(slow_server(connections=2)) as server:
        busy = [Caller(server, {**LONG, "stream": True, "max_tokens": 2}) for _ in range(2)]
        eventually(lambda: len(server.engine.tickets) == 2)
        refused = server.ask("/health")
        assert refused.status == 503 and refused.headers["retry-after"] == "1"
        let(server, 10)
        for caller in busy:
            assert b'"finish_reason":"length"' in caller.until(b"[DONE]")
            caller.hang_up()


def test_a_client_that_goes_before_its_body_came_is_forgotten() -> None:
    with served(scripted_front()) as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as gone:
            gone.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            eventually(lambda: server.front.doorway.in_flight == 1)
        eventually(lambda: server.front.doorway.in_flight == 0)
        assert not server.engine.jobs


def test_what_is_under_way_is_answered_and_what_is_new_refused() -> None:
    with served(slow_server()) as server:
        streaming = Caller(server, {**LONG, "stream": True, "max_tokens": 3})
        whole = Caller(server, {**LONG, "max_tokens": 3})
        let(server, 1)
        streaming.until(b'"text":"a"')
        eventually(lambda: len(server.engine.tickets) == 2)
        server.leave()
        eventually(lambda: server.front.doorway.leaving)
        for path, body in (("/v1/completions", LONG), ("/v1/models", None)):
            reply = server.ask(path, body)
            assert reply.status == 503 and reply.error["type"] == "ServiceUnavailableError"
            assert reply.headers["retry-after"] == "1" and reply.headers["connection"] == "close"
        assert server.ask("/health").status == 503
        assert server.ask("/metrics").status == 200
        let(server, 100)
        assert b'"text":"c"' in streaming.rest() and b"data: [DONE]" in streaming.heard
        assert b'"text":"abc"' in whole.rest() and whole.heard.startswith(b"HTTP/1.1 200")
        server.join()
        assert server.finished is True
        with pytest.raises(OSError):
            server.ask("/health")


def test_what_takes_too_long_is_cut_short_and_told_so() -> None:
    with served(slow_server(), drain_seconds=0.05) as server:
        streaming = Caller(server, {**LONG, "stream": True})
        whole = Caller(server, LONG)
        let(server, 1)
        streaming.until(b'"text":"a"')
        eventually(lambda: len(server.engine.tickets) == 2)
        server.leave()
        told = streaming.rest()
        assert b'"code":503' in told and b"data: [DONE]" in told
        assert whole.rest().startswith(b"HTTP/1.1 503")
        server.join()
        assert server.finished is False


def test_a_second_signal_does_not_wait() -> None:
    with served(slow_server()) as server:
        caller = Caller(server, {**LONG, "stream": True})
        let(server, 1)
        caller.until(b'"text":"a"')
        server.leave()
        eventually(lambda: server.front.doorway.leaving)
        server.leave()
        server.join()
        assert server.finished is False
        caller.hang_up()


def test_an_idle_server_leaves_at_once_and_idle_connections_with_it() -> None:
    with served(scripted_front()) as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert idle.recv(65536).startswith(b"HTTP/1.1 200")
            server.leave()
            assert idle.recv(65536) == b""
        server.join()
        assert server.finished is True


def shouting(job: Job) -> Iterator[Event]:
    """More than the system's buffers take."""
    for _ in range(16):
        yield Token(2, "a" * 10**6)
    yield Finished("length", "", len(job.prompt), 0, 16)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_keeps_no_server_from_its_end(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_REST_SECONDS", 0.2)
    with served(scripted_front(shouting), drain_seconds=0.05) as server:
        caller = Caller(server, {**LONG, "stream": stream})
        caller.until(b"aaaa")
        server.leave()
        server.join()
        assert server.finished is not stream  # whole answers are out of our hands
        caller.hang_up()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_hung_up_on(stream: bool, tmp_path: Path) -> None:
    """Else it kept its connection, its key's place and its version for ever."""
    key = add_key(tmp_path / "keys.json", "ada", ["inference"], at_once=1)
    with served(scripted_front(shouting, keys=tmp_path / "keys.json", read_seconds=0.2)) as server:
        caller = Caller(server, {**LONG, "stream": stream}, key)
        caller.until(b"aaaa")
        eventually(lambda: not server.http.server_state.connections)
        server.engine.script = spelled
        eventually(lambda: server.ask("/v1/completions", LONG, key=key).status == 200)
        caller.hang_up()


@pytest.mark.long
def test_a_client_that_reads_slowly_is_waited_for() -> None:
    """A large answer may take longer than a reader may do nothing, and is whole."""
    with served(scripted_front(shouting, read_seconds=2.0)) as server:
        caller = Caller(server, {**LONG, "stream": False})
        caller.until(b"aaaa")
        for megabytes in range(1, 9):
            time.sleep(0.5)
            while len(caller.heard) < megabytes * 10**6:
                caller.heard += caller.socket.recv(2**16)
        assert caller.until(b'"finish_reason":"length"').count(b"a") > 16 * 10**6
        caller.hang_up()


def test_a_request_is_answered_also_where_its_lease_cannot_be_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ScriptedLease.release

    def release(lease: ScriptedLease) -> None:
        own(lease)
        raise OSError("the disk is away")

    monkeypatch.setattr(ScriptedLease, "release", release)
    with served(scripted_front()) as server:
        assert server.ask("/v1/completions", LONG).json["choices"][0]["finish_reason"] == "length"


def test_who_waits_for_a_version_holds_up_nobody_else() -> None:
    """However many wait: a large one is verified, or the disk takes its time."""
    with served(scripted_front()) as server:
        go_on, own, waiting = threading.Event(), server.catalogue.acquire, threading.Semaphore(0)

        def acquire(model: str) -> Any:
            if model == "news@v7":
                waiting.release()
                assert go_on.wait(PATIENCE)
            return own(model)

        server.catalogue.acquire = acquire
        slow = [Caller(server, {**LONG, "model": "news@v7"}) for _ in range(40)]
        assert waiting.acquire(timeout=PATIENCE)
        eventually(lambda: server.front.doorway.in_flight == len(slow))
        for model in ("news", "tiny"):
            assert server.ask("/v1/completions", {**LONG, "model": model}).status == 200
        assert len(server.engine.jobs) == 2
        go_on.set()
        for caller in slow:
            assert b'"finish_reason":"length"' in caller.until(b'"finish_reason"')
            caller.hang_up()
