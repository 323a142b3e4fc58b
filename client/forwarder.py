"""What a participant's SuperNode takes for its SuperLink, as a process of its own.

    python -m meadow.client.forwarder --folder CLIENT_HOME --bundle FILE --ready FILE

It listens on this machine's loopback, accepts from the participant's own SuperNode what a SuperNode
needs, and carries it to the coordinator's gateway.  No bundle passes but the one that this machine
built itself, and nothing else that could be run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import HttpVersion11, web

from ..errors import ConfigError, GatewayError, MeadowError
from ..fleet_routes import (
    ANSWER_HEADERS,
    FLEET_ROUTES,
    GET_FAB,
    HEARTBEAT,
    LARGEST_BODY,
    REFUSAL,
)
from ..identity import default_path
from ..service_process import asked_to_end, service_process
from ..store import Disk, explained
from .bundle_answer import carries_exactly
from .flower_key import FlowerKey
from .gateway_connection import Answer
from .home import FLOWER_KEY, FORWARDER_AUTHORITY
from .loopback_tls import loopback_tls
from .traffic_log import TrafficLog
from .uplink import Uplink

log = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds for which a request is tried again while the gateway is away."""
_HEARTBEAT_PATIENCE = 4.0  # Flower's own time-out is 5
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 2.0
_SIGN_OF_LIFE = 2.0  # seconds between interim answers; Flower's time-outs begin anew with each
_INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
_FAILED = 500  # as when a database is busy
_THREADS = 16
_RENEWAL_SECONDS = 600.0
_SERVER_SECONDS = 3.0


@dataclass(frozen=True)
class ForwarderOptions:
    """What the process is started with."""

    folder: Path
    """The participant's."""
    bundle: Path
    """The one bundle that may pass."""
    ready: Path
    """Gets the port, as text, once the forwarder listens."""
    identity: Path = field(default_factory=default_path)


class Rejection(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, error: str, hint: str = "") -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint


class Forwarder:
    """A forwarder that listens, from `running` on until that block ends."""

    def __init__(
        self,
        options: ForwarderOptions,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` is this machine's (Unix seconds), right or wrong.

        Raises MeadowError where the participant's folder cannot be used.
        """
        self._options, self._disk, self._clock = options, disk or Disk(), clock
        folder = options.folder
        self._key = FlowerKey.load(folder / FLOWER_KEY)
        with explained(options.bundle):
            self._bundle = options.bundle.read_bytes()
        self._traffic = TrafficLog(folder / "traffic.jsonl")
        told = self._traffic.add
        self._uplink = Uplink(folder, options.identity, self._key, self._disk, clock, told)
        self._threads = ThreadPoolExecutor(_THREADS, "meadow-forwarder")
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer the SuperNode, and keep the certificate fresh."""
        with self._traffic:
            server = web.Server(self.handle, access_log=None, auto_decompress=False)
            listener = await self._listen(server)
            renewal = asyncio.create_task(self._renew())
            self._disk.write(self._options.ready, str(self.port).encode())
            try:
                yield
            finally:
                listener.close()
                renewal.cancel()
                self._uplink.close()
                await server.shutdown(_SERVER_SECONDS)
                self._threads.shutdown(wait=False, cancel_futures=True)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request of the SuperNode's."""
        try:
            self._admit(request)
            body = await _body(request)
            return _response(await self._carried(request, body))
        except Rejection as rejection:
            log.warning("%s: %s", request.raw_path[:80], rejection.error)
            return _rejected(rejection)

    def _admit(self, request: web.BaseRequest) -> None:
        """Other programs on this machine reach the port too: only the SuperNode may use it."""
        exists = request.method == "POST" and request.raw_path in FLEET_ROUTES
        if not exists or request.version != HttpVersion11:
            raise Rejection(404, "there is no such thing here")
        if not self._key.made(request.headers, self._clock()):
            raise Rejection(403, "this is not the participant's own SuperNode")

    async def _carried(self, request: web.BaseRequest, body: bytes) -> Answer:
        """The gateway's answer.  While it takes its time the SuperNode gets signs of life."""
        work = asyncio.ensure_future(self._patiently(request, body))
        while not (await asyncio.wait({work}, timeout=_SIGN_OF_LIFE))[0]:
            if request.transport is None or request.transport.is_closing():
                work.cancel()
                raise Rejection(503, "the SuperNode has gone")
            request.transport.write(_INTERIM)
        return self._checked(request.raw_path, work.result())

    async def _patiently(self, request: web.BaseRequest, body: bytes) -> Answer:
        """Try again, for a while, where the gateway cannot be reached or fails.

        A SuperNode takes a failure for an answer, and drops what it was sending.
        """
        patience = _HEARTBEAT_PATIENCE if request.raw_path == HEARTBEAT else PATIENCE
        end, delay = time.monotonic() + patience, _FIRST_DELAY
        while True:
            try:
                answer = await self._once(request, body)
                if answer.status != _FAILED or time.monotonic() + delay > end:
                    return answer
                log.warning("%s: the coordinator failed, asking again", request.raw_path)
            except GatewayError as error:
                if error.status or time.monotonic() + delay > end:
                    raise Rejection(503, error.message, error.hint) from error
            except MeadowError as error:
                raise Rejection(503, error.message, error.hint) from error
            await asyncio.sleep(delay)
            delay = min(_LONGEST_DELAY, 2 * delay)

    async def _once(self, request: web.BaseRequest, body: bytes) -> Answer:
        loop, headers = asyncio.get_running_loop(), request.headers.copy()
        return await loop.run_in_executor(
            self._threads, self._uplink.fleet, request.raw_path, headers, body
        )

    def _checked(self, path: str, answer: Answer) -> Answer:
        """The answer, unless it carries a bundle that is not ours."""
        if path != GET_FAB or answer.status != 200 or carries_exactly(answer.body, self._bundle):
            return answer
        reason = "the coordinator sent a bundle that this machine did not build: it was not run"
        self._threads.submit(self._uplink.refusal, 0, reason)
        raise Rejection(403, reason)

    async def _renew(self) -> None:
        """Look now and then whether the certificate is due."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._threads, self._uplink.renew_if_due)
            except MeadowError as error:
                log.warning("the certificate is not renewed now: %s", error)
            await asyncio.sleep(_RENEWAL_SECONDS)

    async def _listen(self, server: web.Server) -> asyncio.Server:
        """At the port of the last time where that is free: a SuperNode keeps its address."""
        folder = self._options.folder
        tls = loopback_tls(folder / "forwarder.pem", folder / FORWARDER_AUTHORITY, self._disk)
        last = folder / "forwarder-last-port"
        for port in (_port_in(last), 0):
            try:
                listener = await asyncio.get_running_loop().create_server(
                    server, "127.0.0.1", port, ssl=tls
                )
            except OSError as error:
                if not port:
                    raise ConfigError(f"cannot listen on 127.0.0.1: {error.strerror}") from error
                continue
            self.port = int(listener.sockets[0].getsockname()[1])
            self._disk.write(last, str(self.port).encode())
            return listener
        raise AssertionError("port 0 is always tried")


async def _body(request: web.BaseRequest) -> bytes:
    length = request.content_length
    if length is None:
        raise Rejection(411, "declare the body's length")
    if length > LARGEST_BODY:
        raise Rejection(413, f"the body has {length} bytes, {LARGEST_BODY} at most are accepted")
    try:
        return await request.content.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise Rejection(400, "the request's body is cut off") from error


def _response(answer: Answer) -> web.Response:
    headers = {name: answer.headers[name] for name in ANSWER_HEADERS if name in answer.headers}
    return web.Response(status=answer.status, headers=headers, body=answer.body)


def _rejected(rejection: Rejection) -> web.Response:
    text = json.dumps({"error": rejection.error, "hint": rejection.hint})
    response = web.Response(
        status=rejection.status, body=text.encode(), content_type="application/json"
    )
    response.headers[REFUSAL] = "1"
    return response


def _port_in(file: Path) -> int:
    """The port that a file names; 0 where it does not."""
    try:
        port = int(file.read_text())
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 65536 else 0


async def serve(options: ForwarderOptions) -> None:
    """Answer until the process is asked to end."""
    ended = asked_to_end()
    forwarder = Forwarder(options)
    async with forwarder.running():
        log.info("listening at port %d", forwarder.port)
        await ended.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="meadow.client.forwarder")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--ready", type=Path, required=True)
    options = ForwarderOptions(**vars(parser.parse_args(arguments)))
    with service_process():
        asyncio.run(serve(options))


if __name__ == "__main__":
    main()
