"""The resident trainer's socket: its own user's processes may ask, in gRPC, nobody else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..closeable import Closeable
from ..errors import MeadowError, TrainerError
from .home import require_private
from .peer_net import grpc
from .trainer_link import GREET, OPTIONS, SERVICE, target
from .verbs import Verbs
from .work_limits import Stopping

Handler = Callable[[str, bytes, Callable[[], bool]], bytes]
"""Verb, body, and whether the caller still waits -> answer.  Its MeadowErrors are told to the
caller."""

_VERB = "[a-z][a-z-]{0,31}"
_THREADS = 8

log = logging.getLogger(__name__)


class TrainerSocket(Closeable):
    """Serves from the moment it is made until it is closed."""

    def __init__(self, path: Path, handler: Handler, grace: float = 5.0) -> None:
        """Raises IdentityError unless the socket's folder is its owner's alone, and TrainerError
        where nothing can listen there."""
        require_private(path.parent)
        self._handler, self._grace = handler, grace
        self._workers = ThreadPoolExecutor(_THREADS, "meadow-trainer")
        verbs = Verbs(SERVICE, _VERB, self._method)
        self._server = grpc.server(self._workers, [verbs], options=OPTIONS)
        try:
            self._server.add_insecure_port(target(path))
        except RuntimeError as error:
            self._workers.shutdown()
            raise TrainerError(f"cannot listen at {path}") from error
        path.chmod(0o600)  # the folder kept others out before
        self._server.start()

    def close(self) -> None:
        """Let calls end within the grace, then cut them; no handler runs afterwards."""
        self._server.stop(self._grace).wait()
        self._workers.shutdown()

    def _method(self, verb: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(partial(self._serve, verb))

    def _serve(self, verb: str, body: bytes, context: grpc.ServicerContext) -> bytes:
        if verb == GREET:
            return b""
        try:
            return self._handler(verb, body, context.is_active)
        except Stopping as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except MeadowError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception:
            log.exception("%r met a defect", verb)
            context.abort(grpc.StatusCode.INTERNAL, "it met a defect; its own log says which")
