"""What the gateway does with a request: first who asks, then what.

    GET  /meadow/v1/health     for anybody
    POST /meadow/v1/enrol      for whoever holds an invitation
    POST /meadow/v1/session    with a participant's certificate; opens a session
    POST /meadow/v1/renew      in a session, like all that follows
    GET  /meadow/v1/terms
    POST /meadow/v1/withdraw
    POST /meadow/v1/refusal
    POST /v1/fleet/...         Flower's twelve, handed on to the SuperLink

Everything else does not exist.  In a session each request is signed and counts once: see
meadow/signed_request.py.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from ..errors import MeadowError
from ..fleet_routes import (
    CONFIRM,
    FLEET,
    FLEET_ROUTES,
    LARGEST_BODY,
    PUBLIC_KEY,
    PULL_MESSAGES,
    PUSH_MESSAGES,
)
from ..signed_request import SESSION, check
from .gateway_announcement import require_own_answer
from .gateway_caller import Holder, holder_of, not_barred
from .gateway_deliveries import Deliveries
from .gateway_desk import Desk
from .gateway_limits import Limits
from .gateway_receipts import Receipts
from .gateway_refusal import Refusal, answer_of
from .gateway_request import GRACE_SECONDS, SMALL, Body, check_form, received
from .gateway_sessions import Sessions
from .gateway_superlink import SuperLink, Whole, pass_back
from .gateway_tls import Shown
from .participant import Participant

log = logging.getLogger(__name__)

HEALTH = "/meadow/v1/health"
ENROL = "/meadow/v1/enrol"
OPEN_SESSION = "/meadow/v1/session"
RENEW = "/meadow/v1/renew"
TERMS = "/meadow/v1/terms"
WITHDRAW = "/meadow/v1/withdraw"
REFUSED = "/meadow/v1/refusal"

_MOST_BODIES = 4  # that are in memory at a time
_LARGE = frozenset({FLEET + "push-object", PUSH_MESSAGES})

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Routes:
    """Answers one gateway's requests.  One event loop uses it."""

    def __init__(
        self,
        desk: Desk,
        superlink: SuperLink,
        shown: Shown,
        largest: int = LARGEST_BODY,
        grace: float = GRACE_SECONDS,
    ) -> None:
        """`largest` is the most bytes of a body, `grace` the seconds in which even a small one has
        to come."""
        self._desk, self._superlink, self._shown = desk, superlink, shown
        self._largest, self._grace = largest, grace
        self._sessions, self._limits = Sessions(), Limits()
        self._deliveries, self._receipts = Deliveries(), Receipts()
        self._room = asyncio.Semaphore(_MOST_BODIES)
        self._enrolling = asyncio.Lock()  # strangers share one place in the queue
        self._handlers: dict[tuple[str, str], Handler] = {
            ("GET", HEALTH): self._health,
            ("POST", ENROL): self._enrol,
            ("POST", OPEN_SESSION): self._open_session,
            ("POST", RENEW): self._renew,
            ("GET", TERMS): self._terms,
            ("POST", WITHDRAW): self._withdraw,
            ("POST", REFUSED): self._refused,
            **{("POST", path): self._fleet for path in FLEET_ROUTES},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request, whatever it is."""
        try:
            check_form(request)
            handler = self._handlers.get((request.method, request.raw_path))
            if handler is None:
                raise Refusal(404, "there is no such thing here")
            return await handler(request)
        except Refusal as refusal:
            return self._refuse(request, refusal)
        except MeadowError as error:
            return self._refuse(request, Refusal.of(error))

    def _refuse(self, request: web.BaseRequest, refusal: Refusal) -> web.Response:
        target = f"{request.method[:8]!r} {request.raw_path[:80]!r}"
        log.info("%s from %s: %d, %s", target, request.remote, refusal.status, refusal.error)
        return refusal.answer()

    # Without a certificate

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._body(request):
            return answer_of(self._desk.health())

    async def _enrol(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._body(request) as body, self._enrolling:
            return answer_of(await asyncio.to_thread(self._desk.enrol, body.read()))

    # With a certificate

    async def _open_session(self, request: web.BaseRequest) -> web.StreamResponse:
        holder = await self._holder(request)
        with self._limits.request(holder.key):
            async with self._body(request) as body:
                claim = self._check(request, holder, data := body.read())
                if claim != ("", 0):
                    raise Refusal(401, "a session is asked for outside of any")
                nonce = self._desk.nonce(data)
                return answer_of(self._desk.session(self._sessions.open(holder.key, nonce)))

    async def _renew(self, request: web.BaseRequest) -> web.StreamResponse:
        """Also for a key that was replaced a moment ago: its owner may not know yet."""
        holder = await self._holder(request)
        async with self._signed(request, holder) as data:
            return answer_of(await asyncio.to_thread(self._desk.renew, holder.key, data))

    async def _terms(self, request: web.BaseRequest) -> web.StreamResponse:
        holder, _ = await self._participant(request)
        async with self._signed(request, holder):
            return web.Response(
                body=await asyncio.to_thread(self._desk.terms), content_type="application/json"
            )

    async def _withdraw(self, request: web.BaseRequest) -> web.StreamResponse:
        holder, _ = await self._participant(request)
        async with self._signed(request, holder):
            self._limits.note(holder.key)
            return answer_of(await asyncio.to_thread(self._desk.withdraw, holder.key))

    async def _refused(self, request: web.BaseRequest) -> web.StreamResponse:
        holder, _ = await self._participant(request)
        async with self._signed(request, holder) as data:
            self._limits.note(holder.key)
            return answer_of(await asyncio.to_thread(self._desk.refusal, holder.key, data))

    # Flower's

    async def _fleet(self, request: web.BaseRequest) -> web.StreamResponse:
        holder, participant = await self._participant(request)
        _require_own_node(request, participant)
        with self._limits.request(holder.key):
            if request.raw_path == PULL_MESSAGES:
                return await self._pull(request, holder)
            largest = self._largest if request.raw_path in _LARGE else SMALL
            async with self._body(request, largest) as body, self._space(body):
                self._count(request, holder, data := body.read())
                if request.raw_path == PUSH_MESSAGES:
                    return await self._announce(request, participant, data)
                answer = await self._superlink.ask(request.raw_path, request.headers, data)
            if request.raw_path == CONFIRM and answer.status == 200:
                self._deliveries.confirmed(holder.key)
            async with answer:
                return await pass_back(answer, request)

    async def _pull(self, request: web.BaseRequest, holder: Holder) -> web.StreamResponse:
        async with self._body(request) as body:
            self._count(request, holder, data := body.read())
        newest = self._deliveries.turn(holder.key)
        pulled = self._deliveries.again(holder.key)
        if pulled is None:
            pulled = await self._superlink.pull(
                request.headers, data, lambda: newest() and _is_there(request)
            )
            self._deliveries.keep(holder.key, pulled)
        return _response(pulled)

    async def _announce(
        self, request: web.BaseRequest, participant: Participant, body: bytes
    ) -> web.StreamResponse:
        require_own_answer(body, participant.node_id)
        async with self._receipts.turn(participant.key):
            receipt = self._receipts.of(participant.key, body)
            if receipt is None:
                receipt = await self._superlink.told(PUSH_MESSAGES, request.headers, body)
                self._receipts.keep(participant.key, body, receipt)
        return _response(receipt)

    # What they have in common

    async def _holder(self, request: web.BaseRequest) -> Holder:
        """Whose certificate it is; who was shut out is told so."""
        holder = holder_of(request, self._desk.now())
        await asyncio.to_thread(not_barred, self._desk.roster, holder.key)
        return holder

    async def _participant(self, request: web.BaseRequest) -> tuple[Holder, Participant]:
        """Whose certificate it is, once that participant may take part."""
        holder = holder_of(request, self._desk.now())
        return holder, await asyncio.to_thread(self._desk.participant, holder.key)

    @asynccontextmanager
    async def _signed(self, request: web.BaseRequest, holder: Holder) -> AsyncIterator[bytes]:
        """The body of a small request, once it is found to be signed and new."""
        with self._limits.request(holder.key):
            async with self._body(request) as body:
                self._count(request, holder, data := body.read())
                yield data

    @asynccontextmanager
    async def _body(self, request: web.BaseRequest, largest: int = SMALL) -> AsyncIterator[Body]:
        async with received(request, min(largest, self._largest), self._grace) as body:
            yield body

    @asynccontextmanager
    async def _space(self, body: Body) -> AsyncIterator[None]:
        """Room in memory for a large body; a small one needs none."""
        if body.length <= SMALL:
            yield
            return
        async with self._room:
            yield

    def _count(self, request: web.BaseRequest, holder: Holder, body: bytes) -> None:
        """Let a request count, once.  Refusal unless its own key signed it in its own session."""
        self._sessions.require(request.headers.get(SESSION, ""), holder.key)
        session, sequence = self._check(request, holder, body)
        self._sessions.admit(session, holder.key, sequence)

    def _check(self, request: web.BaseRequest, holder: Holder, body: bytes) -> tuple[str, int]:
        claim = check(
            request.headers,
            request.method,
            request.raw_path,
            body,
            certificate=self._shown.of(request),
            key=holder.key,
        )
        return claim.session, claim.sequence


def _require_own_node(request: web.BaseRequest, participant: Participant) -> None:
    """Refusal unless the SuperNode behind the request is the participant's own."""
    own = base64.b64encode(participant.flower_key.encode())
    if not hmac.compare_digest(request.headers.get(PUBLIC_KEY, "").encode(), own):
        raise Refusal(
            403, f"{participant.name} speaks with another Flower key than it enrolled with"
        )


def _response(answer: Whole) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def _is_there(request: web.BaseRequest) -> bool:
    return request.transport is not None and not request.transport.is_closing()
