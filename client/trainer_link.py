"""Asking the resident trainer, over gRPC on its unix socket.  Imports no torch.

A call is a verb and bytes, the answer bytes.  Work may take hours, so a call has no deadline; where
the trainer goes away during one, it is asked again once it is back.  That is safe because the
trainer's outbox gives the same bytes to whoever asks for the same round again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from ..closeable import Closeable
from ..errors import ConfigError, TrainerError
from .peer_net import grpc

SERVICE = "/meadow.Trainer/"
TRAIN, EVALUATE, STATUS, DRY_RUN = "train", "evaluate", "status", "dry-run"
GREET = "greet"
"""Asked before each of the others, and answered at once."""
VERBS = (TRAIN, EVALUATE, STATUS, DRY_RUN)
"""The closed list of what can be asked."""

LARGEST = 2**31 - 1
"""Bytes of one message: what a protobuf body holds, and so a message of a run at most."""

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", LARGEST),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.enable_retries", 0),  # calls are repeated below, where it can be seen
]

_LONGEST_PATH = 107  # bytes; what the system takes for a unix socket's name, on Linux
_MOST_LOST = 3
_PAUSE = 0.2  # seconds
_WORKED = 1.0  # seconds; a trainer that is stopping says so sooner
_GREETING = 1.0  # seconds that it may take at least, however little patience is left
_CONNECTION = 5.0  # seconds that a busy machine may take over one


def target(socket: Path) -> str:
    """gRPC's name of a unix socket.  Raises ConfigError where the system takes no such path."""
    path = str(socket.absolute())
    if len(path.encode()) > _LONGEST_PATH:
        raise ConfigError(
            f"the socket's path {path} has more than {_LONGEST_PATH} bytes",
            "set MEADOW_HOME to a folder with a shorter name",
        )
    return f"unix:{quote(path)}"


class TrainerLink(Closeable):
    """A connection to one trainer; `patience` is how many seconds it may be away."""

    def __init__(
        self, socket: Path, patience: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        options = [*OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100)]
        options += [("grpc.max_reconnect_backoff_ms", 1000)]
        options += [("grpc.min_reconnect_backoff_ms", int(1000 * _CONNECTION))]
        self._channel = grpc.insecure_channel(target(socket), options)
        self._patience, self._clock = patience, clock

    def call(self, verb: str, body: bytes = b"") -> bytes:
        """The trainer's answer.

        Raises TrainerError where it refuses, with its reason, or where it stays away.
        """
        away_since, lost = self._clock(), 0
        while True:
            self._reach(self._patience - (self._clock() - away_since))
            begun = self._clock()
            try:
                return self._attempt(verb, body)
            except _Away as away:
                if self._clock() - begun > _WORKED:
                    away_since, lost = self._clock(), lost + 1
                if lost >= _MOST_LOST:
                    raise TrainerError(f"the trainer ended {lost} times over one request") from away
            time.sleep(_PAUSE)

    def _reach(self, seconds: float) -> None:
        """Wait until the trainer greets, so long at most."""
        end = time.monotonic() + max(seconds, _GREETING)
        while (left := end - time.monotonic()) > 0:
            with suppress(_Away):
                self._attempt(GREET, b"", left)
                return
            time.sleep(min(_PAUSE, left))
        hint = "`meadow client` starts it; its log says why it ended"
        raise TrainerError("the participant's trainer is not running", hint)

    def close(self) -> None:
        self._channel.close()

    def _attempt(self, verb: str, body: bytes, patience: float | None = None) -> bytes:
        """The answer; with `patience` (seconds), only if it comes so soon."""
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        method = self._channel.unary_unary(SERVICE + verb)
        try:
            return method(body, timeout=patience, wait_for_ready=patience is not None)
        except grpc.RpcError as error:
            code, text = _code_of(error), _details_of(error)
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise _Away(text) from error
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise TrainerError(text) from error
            raise TrainerError(f"the trainer gave no answer: {text}") from error


class _Away(Exception):
    """Nobody answers at the socket."""


def _code_of(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code() if isinstance(error, grpc.Call) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details_of(error: grpc.RpcError) -> str:
    details = error.details() if isinstance(error, grpc.Call) else None
    return str(details or "for no known reason")
