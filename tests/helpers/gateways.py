"""A gateway that really listens, before a SuperLink that is played, with participants who enrolled.

Servers run on an event loop in a thread of its own, so that tests can use blocking clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from meadow.client.flower_key import FlowerKey
from meadow.client.forwarder import ForwarderOptions
from meadow.client.gateway_client import GatewayClient
from meadow.client.gateway_connection import Answer
from meadow.client.membership import Membership
from meadow.fleet_routes import FLEET
from meadow.identity import Identity
from meadow.invitation import Invitation
from meadow.server.authority import Authority
from meadow.server.gateway import Gateway, GatewayOptions
from meadow.server.roster import Roster
from meadow.store import Disk

T = TypeVar("T")
PULL = FLEET + "pull-messages"
RUN = FLEET + "get-run"
BUNDLE = b"the one bundle" * 40
TERMS = b'{"format": 1, "run": "ab"}'


class Quick(Disk):
    """What these tests write need not survive a power cut."""

    def sync(self, file: Any) -> None: ...

    def sync_folder(self, folder: Path) -> None: ...


@contextlib.contextmanager
def background() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """An event loop in a thread; what is yielded runs a coroutine there and waits for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    try:
        yield run
        run(_end())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end() -> None:
    """What asyncio.run does before it closes a loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


@dataclass
class Seen:
    """A request that reached the SuperLink."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def names(self) -> set[str]:
        return {name.lower() for name, _ in self.headers}


@dataclass
class FakeSuperLink:
    """Answers every path; keeps all that it was asked."""

    seen: list[Seen] = field(default_factory=list)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    messages: list[bytes] = field(default_factory=list)
    port: int = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        self.seen.append(
            Seen(request.method, request.raw_path, list(request.headers.items()), body)
        )
        if request.raw_path == PULL and PULL not in self.answers:
            return web.Response(body=self.messages.pop(0) if self.messages else b"")
        status, answer = self.answers.get(request.raw_path, (200, b"answer to " + body[:20]))
        headers = {
            "Content-Type": "application/protobuf",
            "Server": "secret",
            "Location": "https://elsewhere.example/",
            "Set-Cookie": "a=b",
            "flwr-version-incompatibility-message": "a newer one",
        }
        return web.Response(status=status, body=answer, headers=headers)

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext) -> Any:
        server = web.Server(self.handle, access_log=None)
        listener = await asyncio.get_running_loop().create_server(
            server, "127.0.0.1", self.port, ssl=tls
        )
        self.port = listener.sockets[0].getsockname()[1]
        self._stop = (listener, server)
        try:
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        """No longer listen."""
        listener, server = self._stop
        listener.close()
        await server.shutdown(1)


@dataclass
class Site:
    """An operator's machine."""

    folder: Path
    authority: Authority
    roster: Roster
    superlink: FakeSuperLink
    gateway: Gateway
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    running: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def start(self, grace: float = 15.0) -> None:
        """Let the gateway listen."""
        self.run(self.running.enter_async_context(self.gateway.running(grace=grace)))

    def stop(self) -> None:
        """Let the gateway end."""
        self.run(self.running.aclose())

    def restart(self) -> None:
        """As after a kill: the same port, and nothing in memory."""
        self.move(self.address)

    def move(self, listen: str = "127.0.0.1:0") -> None:
        """Listen elsewhere."""
        self.stop()
        self.gateway = Gateway(replace(self.gateway.options, listen=listen), Quick())
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    def invite(self, name: str) -> Invitation:
        token = self.roster.invite(name, 3600)
        der = ssl.PEM_cert_to_DER_cert(self.authority.certificate.decode())
        return Invitation(name, (self.address,), der, token, 2**40)

    def participant(self, name: str) -> Person:
        """Somebody who enrolled and was approved."""
        person = Person(Membership.of(self.invite(name)))
        with person.client() as client:
            assert client.enrol(person.flower.public_pem).status == "pending"
            node = 1000 + len(self.roster.participants())
            self.roster.approve(name, node)
            found = client.enrol(person.flower.public_pem)
        person.membership = person.membership.with_certificate(found.certificate)
        return person


@dataclass
class Person:
    """A participant, with all that it holds."""

    membership: Membership
    identity: Identity = field(default_factory=lambda: Identity(Ed25519PrivateKey.generate()))
    flower: FlowerKey = field(default_factory=lambda: FlowerKey(generate_private_key(SECP384R1())))

    def client(self) -> GatewayClient:
        return GatewayClient(self.membership, self.identity)

    def ask(self, client: GatewayClient, path: str = RUN, body: bytes = b"question") -> Answer:
        """One of Flower's requests, as a forwarder makes it."""
        return client.signed("POST", path, body, self.headers(client))

    def headers(self, client: GatewayClient) -> dict[str, str]:
        return {"content-type": "application/protobuf", **self.flower.headers(client.now())}


@contextlib.contextmanager
def site(folder: Path, largest: int = 2**20, grace: float = 15.0) -> Iterator[Site]:
    """A running gateway; see `Gateway` for its limits."""
    authority = Authority.open(folder / "authority", Quick())
    certificate, key = authority.issue_local()
    (folder / "superlink.pem").write_bytes(key + certificate)
    (folder / "authority.pem").write_bytes(authority.certificate)
    (folder / "terms.json").write_bytes(TERMS)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "superlink.pem")
    superlink = FakeSuperLink()
    with background() as run, Roster.open(folder / "roster.db", Quick()) as roster:
        servers = contextlib.AsyncExitStack()
        try:
            run(servers.enter_async_context(superlink.running(tls)))
            options = GatewayOptions(
                folder,
                "127.0.0.1:0",
                f"127.0.0.1:{superlink.port}",
                folder / "authority.pem",
                folder / "gateway.port",
                largest,
            )
            place = Site(folder, authority, roster, superlink, Gateway(options, Quick()), run)
            place.start(grace)
            yield place
            place.stop()
        finally:
            run(servers.aclose())


def home(folder: Path, person: Person) -> Path:
    """A participant's folder with what a forwarder needs; the identity is beside it."""
    folder.mkdir(parents=True)
    person.membership.save(folder, Quick())
    (folder / "flower-key").write_bytes(openssh(person.flower))
    (folder / "flower-key").chmod(0o600)
    identity = folder.parent / f"{folder.name}-identity.pem"
    identity.write_bytes(
        person.identity.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    identity.chmod(0o600)
    (folder.parent / "bundle.fab").write_bytes(BUNDLE)
    return folder


def openssh(key: FlowerKey) -> bytes:
    return key.private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def options_of(folder: Path) -> ForwarderOptions:
    """How a forwarder of `home` is started."""
    beside = folder.parent
    return ForwarderOptions(
        folder,
        beside / "bundle.fab",
        folder / "forwarder.port",
        beside / f"{folder.name}-identity.pem",
    )
