"""What the gateway decides itself: enrolment, certificates, terms and the coordinator's inbox.

Bodies and answers are JSON.  Everything here may wait for the disk or for another process, so that
the gateway calls it on threads of its own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..certificate_request import check_rotation, requested_key
from ..invitation import TOKEN_BYTES
from ..store import explained
from .authority import Authority, expires_at
from .gateway_caller import approved
from .gateway_refusal import Refusal
from .participant import Participant
from .roster import Roster

FORMAT = 1

_NONCE = re.compile("[0-9a-f]{32}")
_SAME = "install the coordinator's version of meadow"

Json = dict[str, Any]


class Desk:
    """One coordinator's.  Threads may share it."""

    def __init__(
        self,
        roster: Roster,
        authority: Authority,
        terms: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.roster, self._authority, self._terms, self.now = roster, authority, terms, clock

    def health(self) -> Json:
        return {"meadow": __version__, "format": FORMAT}

    def participant(self, key: bytes) -> Participant:
        """Who has a key; it was heard of just now.  Refusal unless it may take part."""
        known = approved(self.roster, key)
        self.roster.touch(key)
        return known

    def enrol(self, body: bytes) -> Json:
        """Bind the key that signed the request to the invitation's name; again and again, until
        the operator has approved it and there is a certificate."""
        fields = _fields(body)
        _require_same_meadow(fields)
        token, csr = _token(_text(fields, "token")), _text(fields, "csr").encode()
        key = requested_key(csr)
        participant = self.roster.enrol(token, key, _text(fields, "flower_key"))
        answer: Json = {
            "name": participant.name,
            "fingerprint": participant.fingerprint,
            "status": participant.status,
        }
        if participant.status == "approved":
            answer |= self._certified(participant, csr)
        elif participant.status != "pending":
            raise Refusal(403, f"{participant.name} is {participant.status}", "ask the operator")
        return answer

    def nonce(self, body: bytes) -> str:
        fields = _fields(body)
        nonce = _text(fields, "nonce")
        if "meadow" in fields:
            _require_same_meadow(fields)
        if not _NONCE.fullmatch(nonce):
            raise Refusal(400, "a nonce has 32 hexadecimal digits")
        return nonce

    def session(self, session: str) -> Json:
        return {"session": session, "time": self.now()}

    def renew(self, key: bytes, body: bytes) -> Json:
        """Another certificate for a key, or for the one that takes its place."""
        fields = _fields(body)
        csr = _text(fields, "csr").encode()
        new = requested_key(csr)
        if new != key:
            check_rotation(key, new, _text(fields, "proof"))
            return self._certified(self.roster.rotate(key, new), csr)
        return self._certified(approved(self.roster, key), csr)

    def terms(self) -> bytes:
        """The run's terms, as the coordinator has written them."""
        with explained(self._terms):
            if not self._terms.exists():
                raise Refusal(503, "the coordinator has no run yet", "ask again later")
            return self._terms.read_bytes()

    def withdraw(self, key: bytes) -> Json:
        return {"note": self.roster.note("withdraw", key, "").id}

    def refusal(self, key: bytes, body: bytes) -> Json:
        """Keep why a participant did not do what it was asked."""
        fields = _fields(body)
        number, reason = fields.get("round"), _text(fields, "reason")
        if type(number) is not int or not 0 <= number < 2**31:
            raise Refusal(400, 'the request has no "round"')
        return {"note": self.roster.note("refusal", key, f"round {number}: {reason}").id}

    def _certified(self, participant: Participant, csr: bytes) -> Json:
        certificate = self._authority.issue_client(participant.name, csr)
        self.roster.certified(participant.key, expires_at(certificate))
        return {
            "name": participant.name,
            "fingerprint": participant.fingerprint,
            "status": participant.status,
            "certificate": certificate.decode(),
            "authority": self._authority.certificate.decode(),
            "node_id": str(participant.node_id),
        }


def _fields(body: bytes) -> Json:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the request's body is not JSON") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "the request's body is not a JSON object")
    return fields


def _text(fields: Json, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise Refusal(400, f'the request has no "{name}"')
    return value


def _token(text: str) -> bytes:
    if not re.fullmatch(f"[0-9a-f]{{{2 * TOKEN_BYTES}}}", text):
        raise Refusal(400, "the token is not in hexadecimal")
    return bytes.fromhex(text)


def _require_same_meadow(fields: Json) -> None:
    """Within one minor version messages stay as they are."""
    if fields.get("format", FORMAT) != FORMAT:
        raise Refusal(400, f"this coordinator speaks format {FORMAT}", _SAME)
    version = _text(fields, "meadow")
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise Refusal(
            409, f"the coordinator runs meadow {__version__}, not {version[:40]!r}", _SAME
        )
