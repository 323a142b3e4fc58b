"""A front on a real socket of loopback, in a thread, and callers of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from meadow.server.serving.generation import Front
from meadow.server.serving.http_server import HttpServer

PATIENCE = 60.0


class Server:
    """A front that is being served."""

    def __init__(self, front: Front, drain_seconds: float) -> None:
        self.front, self.failure = front, list[BaseException]()
        self._opened = threading.Event()
        self.http = HttpServer(front, drain_seconds, self._opened.set)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.finished: bool | None = None
        """What `run_on` gave."""
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def engine(self) -> Any:
        return self.front.engine

    @property
    def catalogue(self) -> Any:
        return self.front.catalogue

    def start(self) -> None:
        self.thread.start()
        assert self._opened.wait(PATIENCE), self.failure

    def leave(self) -> None:
        """As a first SIGTERM does."""
        self.http.handle_exit(15, None)

    def join(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive() and not self.failure, self.failure

    def _run(self) -> None:
        try:
            with self._socket:
                self.finished = asyncio.run(self.http.run_on(self._socket))
        except BaseException as error:  # shown where the thread is joined
            self.failure.append(error)

    # As a caller

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        key: str = "",
        raw: bytes | None = None,
        method: str = "",
        headers: dict[str, str] | None = None,
    ) -> Reply:
        data = json.dumps(body).encode() if raw is None and body is not None else raw
        told = {"Content-Type": "application/json"} if data is not None else {}
        told |= {"Authorization": f"Bearer {key}"} if key else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            method = method or ("GET" if data is None else "POST")
            connection.request(method, path, data, told | (headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        assert found["code"] == self.status
        return found

    @property
    def events(self) -> list[Any]:
        """A stream's events; it has to end as one."""
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == "" and parts.pop() == "data: [DONE]"
        assert all(part.startswith("data: ") and "\n" not in part for part in parts)
        return [json.loads(part[6:]) for part in parts]


@contextmanager
def running(front: Front, drain_seconds: float = PATIENCE) -> Iterator[Server]:
    """A server that answers until the block ends."""
    server = Server(front, drain_seconds)
    server.start()
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.leave()
        server.join()
    assert front.doorway.in_flight == 0
