"""A gRPC service whose methods are verbs: every name that can be one is answered, and its handler
says which exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .peer_net import grpc


class Verbs(grpc.GenericRpcHandler):
    """The methods of `service` ("/name/") whose names match the pattern `names`."""

    def __init__(
        self,
        service: str,
        names: str,
        method: Callable[[str], grpc.RpcMethodHandler[bytes, bytes]],
    ) -> None:
        self._pattern = re.compile(f"{re.escape(service)}({names})")
        self._method = method

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        found = self._pattern.fullmatch(details.method)
        return self._method(found[1]) if found else None
