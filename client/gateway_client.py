"""A participant's conversation with the coordinator's gateway.

Every call tries the coordinator's addresses in turn, opens a session where there is none, and signs
(meadow/signed_request.py).  Threads may share a client; each exchange takes a connection of its own
and leaves it for the next.
"""

from __future__ import annotations

import http.client
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..certificate_request import request_certificate, rotation_proof
from ..closeable import Closeable
from ..errors import GatewayError
from ..fleet_routes import REFUSAL
from ..identity import Identity
from ..signed_request import Signer
from .gateway_connection import Answer, GatewayConnection, Headers, client_tls
from .membership import Membership

FORMAT = 1

_ENROL = "/meadow/v1/enrol"
_HEALTH = "/meadow/v1/health"
_REFUSAL = "/meadow/v1/refusal"
_RENEW = "/meadow/v1/renew"
_SESSION = "/meadow/v1/session"
_TERMS = "/meadow/v1/terms"
_WITHDRAW = "/meadow/v1/withdraw"
_UNKNOWN_SESSION = "unknown session"
_JSON = {"Content-Type": "application/json"}
_FAULTS = (OSError, http.client.HTTPException)  # ssl.SSLError and time-outs are OSErrors
_LONGEST_LINE = 300  # characters of what a gateway says

Json = dict[str, Any]
Exchanged = Callable[[str, int, int, int], None]
"""Told of every attempt at an exchange: path, status (0: no answer came), bytes sent and received,
bodies alone."""


@dataclass(frozen=True)
class Enrolment:
    """Where a participant stands.  All but the first three are "" before approval."""

    name: str
    fingerprint: str
    status: str
    certificate: str = ""
    """PEM."""
    authority: str = ""
    """PEM."""
    node_id: str = ""


class GatewayClient(Closeable):
    """One participant's, with the membership as it was given."""

    def __init__(
        self,
        membership: Membership,
        identity: Identity,
        clock: Callable[[], float] = time.monotonic,
        exchanged: Exchanged = lambda path, status, up, down: None,
    ) -> None:
        """Raises IdentityError where the membership's certificate is not the identity's."""
        self.membership, self._identity, self._clock = membership, identity, clock
        self._exchanged = exchanged
        self._tls = client_tls(membership.authority, identity, membership.certificate)
        self._signer = Signer(identity)
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._idle: list[GatewayConnection] = []
        self._busy: set[GatewayConnection] = set()
        self._addresses = list(membership.addresses)  # the one that answered last comes first
        self._ahead = 0.0  # coordinator's time less our clock's
        self._closed = False

    def close(self) -> None:
        """Exchanges that are under way end with GatewayError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                connection.abort()
        for connection in idle:
            connection.close()

    def now(self) -> float:
        """The coordinator's time (Unix seconds), however this machine's clock is set.

        Raises GatewayError where there is no session yet and none can be had.
        """
        if not self._signer.session:
            self.open_session("")
        return self._clock() + self._ahead

    @property
    def session(self) -> str:
        """The session that is open; "" before the first."""
        return self._signer.session

    # Calls

    def health(self) -> Json:
        return _json(self._unsigned("GET", _HEALTH, b""))

    def enrol(self, flower_key: str) -> Enrolment:
        """Show the invitation's token; again and again, until the operator has approved it.

        `flower_key` is the SuperNode's public key (PEM).  Raises GatewayError, with status 403, for
        an invitation that is unknown, expired or used.
        """
        request = {
            "format": FORMAT,
            "token": self.membership.token,
            "csr": request_certificate(self._identity).decode(),
            "flower_key": flower_key,
            "meadow": __version__,
        }
        return _enrolment(_json(self._unsigned("POST", _ENROL, _body(request))))

    def renew(self) -> Enrolment:
        """Another certificate for the same key."""
        request = {"csr": request_certificate(self._identity).decode()}
        return _enrolment(self._call("POST", _RENEW, request))

    def rotate(self, new: Identity) -> Enrolment:
        """Put another key in the place of ours; repeated with the same one, it changes nothing.

        Keep the new key durably before: once this returns, or fails halfway, the old one may count
        no longer.
        """
        proof = rotation_proof(self._identity.public.public_bytes_raw(), new)
        request = {"csr": request_certificate(new).decode(), "proof": proof}
        return _enrolment(self._call("POST", _RENEW, request))

    def terms(self) -> bytes:
        """The run's terms, byte for byte as the coordinator wrote them."""
        return good(self.signed("GET", _TERMS, b"", {})).body

    def withdraw(self) -> None:
        """Ask the coordinator to retract what this participant has contributed."""
        self._call("POST", _WITHDRAW, {})

    def refusal(self, round: int, reason: str) -> None:
        """Tell the coordinator why something was not done."""
        self._call("POST", _REFUSAL, {"round": round, "reason": reason})

    def signed(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """A signed exchange; the answer is whatever came, refusals included.

        Raises GatewayError where no address gives one.
        """
        if not self._signer.session:
            self.open_session("")
        session = self._signer.session
        answer = self._signed(method, path, body, headers)
        if answer.status == 401 and _reason(answer)[0] == _UNKNOWN_SESSION:
            self.open_session(session)  # the gateway was started anew
            answer = self._signed(method, path, body, headers)
        return answer

    def open_session(self, instead_of: str) -> None:
        """Open a session, unless another thread has done so since."""
        with self._opening:
            if self._signer.session != instead_of:
                return
            body = _body({"nonce": secrets.token_hex(16), "meadow": __version__})

            def headers(certificate: bytes) -> dict[str, str]:
                return _JSON | self._signer.opening("POST", _SESSION, body, certificate)

            found = _json(good(self._exchange("POST", _SESSION, body, headers)))
            try:
                self._ahead = float(found["time"]) - self._clock()
                self._signer.begin(str(found["session"]))
            except (KeyError, ValueError, TypeError) as error:
                raise GatewayError("the gateway gave out no session") from error

    # Exchanges

    def _call(self, method: str, path: str, request: Json) -> Json:
        return _json(good(self.signed(method, path, _body(request), _JSON)))

    def _unsigned(self, method: str, path: str, body: bytes) -> Answer:
        return good(self._exchange(method, path, body, lambda certificate: _JSON))

    def _signed(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        def all_headers(certificate: bytes) -> dict[str, str]:
            return {**headers, **self._signer.headers(method, path, body, certificate)}

        return self._exchange(method, path, body, all_headers)

    def _exchange(self, method: str, path: str, body: bytes, headers: Headers) -> Answer:
        """By the first address that answers, which is then tried first."""
        reasons = []
        for address in list(self._addresses):
            try:
                answer = self._at(address, method, path, body, headers)
            except _FAULTS as error:
                reasons.append(f"{address}: {_why(error)}")
                continue
            with self._lock:
                self._addresses.sort(key=lambda other: other != address)
            return answer
        raise GatewayError(
            f"the coordinator's gateway cannot be reached ({'; '.join(reasons)})",
            "check the network, and the addresses in membership.json",
        )

    def _at(self, address: str, method: str, path: str, body: bytes, headers: Headers) -> Answer:
        connection = self._take(address)
        was_open = connection.is_open
        try:
            return self._use(connection, method, path, body, headers)
        except _FAULTS:
            if not was_open or self._closed:
                raise
        # The gateway closes what was idle for long; that is no fault.
        return self._use(self._fresh(address), method, path, body, headers)

    def _use(
        self, connection: GatewayConnection, method: str, path: str, body: bytes, headers: Headers
    ) -> Answer:
        status = down = 0
        try:
            answer = connection.exchange(method, path, body, headers)
            status, down = answer.status, len(answer.body)
            return answer
        finally:
            self._exchanged(path, status, len(body), down)
            with self._lock:
                self._busy.discard(connection)
                if connection.is_open and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.close()

    def _take(self, address: str) -> GatewayConnection:
        with self._lock:
            for connection in self._idle:
                if connection.address == address:
                    self._idle.remove(connection)
                    self._busy.add(connection)
                    return connection
        return self._fresh(address)

    def _fresh(self, address: str) -> GatewayConnection:
        connection = GatewayConnection(address, self._tls)
        with self._lock:
            if self._closed:
                raise GatewayError("this end was closed")
            self._busy.add(connection)
        return connection


def _body(value: Json) -> bytes:
    return json.dumps(value).encode()


def good(answer: Answer) -> Answer:
    """The answer, if it is none that refuses.  Raises GatewayError."""
    if answer.status == 200:
        return answer
    error, hint = _reason(answer)
    raise GatewayError(error or f"the gateway answers {answer.status}", hint, answer.status)


def _reason(answer: Answer) -> tuple[str, str]:
    """Why the gateway itself refuses, and what to do; "" where the SuperLink answered."""
    if REFUSAL.lower() not in answer.headers:
        return "", ""
    try:
        found = json.loads(answer.body)
        return _line(found["error"]), _line(found["hint"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def _line(text: object) -> str:
    """What came from outside, as one printable line."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:_LONGEST_LINE]


def _json(answer: Answer) -> Json:
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise GatewayError("the gateway's answer is not JSON", "is this a coordinator?") from error
    if not isinstance(found, dict):
        raise GatewayError("the gateway's answer is not JSON", "is this a coordinator?")
    return found


def _enrolment(found: Json) -> Enrolment:
    names = ("name", "fingerprint", "status", "certificate", "authority", "node_id")
    fields = {name: found[name] for name in names if name in found}
    if fields.keys() < set(names[:3]) or not all(isinstance(v, str) for v in fields.values()):
        raise GatewayError("the gateway's answer says nothing of an enrolment")
    return Enrolment(**fields)


def _why(error: Exception) -> str:
    """A connection's fault in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused, {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS, {error.reason or error}"
    return str(error) or type(error).__name__
