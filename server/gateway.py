"""The coordinator's public port, as a process of its own.

    python -m meadow.server.gateway --folder DIR --listen HOST:PORT --superlink HOST:PORT
        --superlink-authority FILE --ready FILE

It is all that the world sees of a coordinator.  It keeps nothing but sessions in memory, so that it
may be killed and started again at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ..address import split_address
from ..config import CoordinatorConfig, load
from ..errors import ConfigError, MeadowError
from ..fleet_routes import LARGEST_BODY
from ..service_process import asked_to_end, service_process
from ..store import Disk
from .authority import LOCAL_HOSTS, Authority
from .gateway_desk import Desk
from .gateway_request import GRACE_SECONDS
from .gateway_routes import Routes
from .gateway_superlink import SuperLink
from .gateway_tls import Issue, ServerTls, Shown, spare_buffers, superlink_tls
from .roster import Roster

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
IDLE_SECONDS = 60.0
"""After which a connection on which nothing, or not yet a whole request, came is closed."""
STOP_SECONDS = 4.0
_REFRESH_SECONDS = 3600.0
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class GatewayOptions:
    """What the process is started with."""

    folder: Path
    listen: str
    """host:port; port 0 takes one that is free."""
    superlink: str
    """host:port."""
    superlink_authority: Path
    """Who vouches for the SuperLink (PEM)."""
    ready: Path
    """Gets the port, as text, once the gateway listens."""
    largest: int = LARGEST_BODY
    """Bytes of a request's body."""


class Listener(web.Server):
    """Takes connections, and notes for each what certificate it was shown."""

    def __init__(self, routes: Routes, tls: ServerTls, shown: Shown, idle: float) -> None:
        super().__init__(
            routes.handle,
            access_log=None,
            keepalive_timeout=idle,
            lingering_time=2.0,
            auto_decompress=False,
        )
        self._tls, self._shown = tls, shown

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        self._shown.add(transport, self._tls.certificate)
        super().connection_made(handler, transport)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        if handler.transport is not None:
            self._shown.discard(handler.transport)
        super().connection_lost(handler, exc)


class Gateway:
    """A gateway that listens, from `running` on until that block ends."""

    def __init__(self, options: GatewayOptions, disk: Disk | None = None) -> None:
        self.options, self._disk = options, disk or Disk()
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(
        self, idle: float = IDLE_SECONDS, grace: float = GRACE_SECONDS
    ) -> AsyncIterator[None]:
        """Answer requests; `grace` is the time in which even a small body has to come.

        Raises MeadowError where the folder cannot be used, ConfigError where nobody can listen.
        """
        options = self.options
        authority = Authority.open(options.folder / "authority", self._disk)
        issue = self._issuer(authority)
        self._tls = ServerTls(options.folder, issue, authority.certificate, self._disk)
        async with contextlib.AsyncExitStack() as resources:
            roster = resources.enter_context(Roster.open(options.folder / "roster.db", self._disk))
            desk = Desk(roster, authority, options.folder / "terms.json")
            way = SuperLink(options.superlink, superlink_tls(options.superlink_authority))
            superlink = await resources.enter_async_context(way)
            shown = Shown()
            routes = Routes(desk, superlink, shown, options.largest, grace)
            listener = Listener(routes, self._tls, shown, idle)
            server = await self._listen(listener)
            resources.push_async_callback(_stop, server, listener, superlink)
            self._disk.write(options.ready, str(self.port).encode())
            yield

    def refresh(self) -> None:
        """Take up a renewed certificate.  One that cannot be had now is no reason to stop: the old
        one still holds."""
        try:
            self._tls.refresh()
        except MeadowError as error:
            log.error("the public port's certificate could not be renewed: %s", error)

    async def _listen(self, listener: Listener) -> asyncio.Server:
        host, _, port = self.options.listen.rpartition(":")
        host = host.strip("[]")
        try:
            server = await asyncio.get_running_loop().create_server(
                listener,
                host or None,
                int(port),
                ssl=self._tls.context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {self.options.listen}: {error.strerror or error}",
                "choose another address in [coordinator] listen",
            ) from error
        self.port = int(server.sockets[0].getsockname()[1])
        return server

    def _issuer(self, authority: Authority) -> Issue:
        """Where the public port's certificate comes from: the operator, or our own authority."""
        settings = self.options.folder / "run.toml"
        coordinator = load(settings).coordinator if settings.exists() else CoordinatorConfig()
        if coordinator.certificate:
            files = Path(coordinator.certificate), Path(coordinator.key)
            return lambda: Authority.server_files(*files)
        hosts = _hosts(self.options.listen, coordinator.addresses)
        return lambda: authority.issue_server(hosts)


async def _stop(server: asyncio.Server, listener: Listener, superlink: SuperLink) -> None:
    """Take no more connections, let what is under way end, then close."""
    server.close()
    superlink.stop()
    listener.pre_shutdown()
    await listener.shutdown(STOP_SECONDS)


async def serve(options: GatewayOptions) -> None:
    """Answer requests until the process is asked to end."""
    ended = asked_to_end()
    gateway = Gateway(options)
    async with gateway.running():
        log.info("listening at port %d", gateway.port)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _REFRESH_SECONDS)
            gateway.refresh()


def _hosts(listen: str, addresses: Sequence[str]) -> list[str]:
    """By which names the gateway is reached."""
    hosts = [split_address(address)[0] for address in addresses]
    host = listen.rpartition(":")[0]
    hosts.append(socket.getfqdn() if host in _WILDCARDS else host.strip("[]"))
    return list(dict.fromkeys([*hosts, *LOCAL_HOSTS]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="meadow.server.gateway")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--superlink-authority", type=Path, required=True)
    parser.add_argument("--ready", type=Path, required=True)
    parser.add_argument("--largest", type=int, default=LARGEST_BODY)
    options = GatewayOptions(**vars(parser.parse_args(arguments)))
    spare_buffers()
    with service_process():
        asyncio.run(serve(options))


if __name__ == "__main__":
    main()
