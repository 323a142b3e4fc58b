"""The gateway's own word: an answer in JSON, and the refusals among them.

A refusal says in one line what is wrong and in another what to do, and never what lies behind the
gateway.
"""

from __future__ import annotations

import json

from aiohttp import web

from ..canonical_json import Json
from ..errors import (
    IdentityError,
    InvitationError,
    JournalError,
    MeadowError,
    RosterError,
    StorageError,
)
from ..fleet_routes import REFUSAL

UNKNOWN_SESSION = "unknown session"
"""What a forwarder takes as the request to open another session."""

_STATUS: dict[type[MeadowError], int] = {
    IdentityError: 401,
    InvitationError: 403,
    RosterError: 403,
    JournalError: 503,
    StorageError: 503,
}


class Refusal(Exception):
    """A request that is not carried out."""

    def __init__(self, status: int, error: str, hint: str = "") -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint

    @classmethod
    def of(cls, error: MeadowError) -> Refusal:
        """The answer to a request that led to one of meadow's errors."""
        return cls(_STATUS.get(type(error), 400), error.message, error.hint)

    def answer(self) -> web.Response:
        """The connection ends with it: whatever else it carries was meant for nobody."""
        response = answer_of({"error": self.error, "hint": self.hint}, self.status)
        response.headers[REFUSAL] = "1"
        response.force_close()
        return response


def answer_of(value: Json, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=json.dumps(value).encode(), content_type="application/json"
    )
