"""Refusals in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from ...errors import (
    AdapterError,
    FormatError,
    IdentityError,
    JournalError,
    MeadowError,
    OverloadedError,
    RegistryError,
    StoppedError,
    StorageError,
    TooLongError,
    UnknownModelError,
)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    421: "MisdirectedRequestError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_NOT_NOW = (
    RegistryError, AdapterError, FormatError, IdentityError, JournalError, StorageError,
)  # fmt: skip
"""What is wrong with a version or its registry."""
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
_LONGEST = 600  # characters of a message: it may quote what was asked


class ApiError(Exception):
    """A request that is refused; `param` names the part of it that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        retry_after: float = 0.0,
        close: bool = False,
    ) -> None:
        """`retry_after` in seconds; with `close`, the connection ends with the answer."""
        super().__init__(message)
        self.status, self.message, self.param = status, message[:_LONGEST], param
        self.headers = dict(_CHALLENGE) if status == 401 else {}
        if retry_after > 0:
            self.headers["Retry-After"] = str(math.ceil(retry_after))
        if close:
            self.headers["Connection"] = "close"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "InvalidRequestError"),
                "param": self.param,
                "code": self.status,
            }
        }

    def answer(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def refusal(error: MeadowError) -> ApiError:
    """What a caller hears of one of meadow's errors: its own mistakes, and nothing of the rest."""
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), "model")
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), "max_tokens")
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), retry_after=max(1.0, error.retry_after))
    if isinstance(error, StoppedError):
        return ApiError(503, "the server is ending", retry_after=1.0, close=True)
    if isinstance(error, _NOT_NOW):
        return ApiError(503, "this model cannot be loaded now; the server's log says why", "model")
    return ApiError(500, "the server could not answer; its log says why")
