"""A wire between participants and a coordinator that a test can cut, slow down, or make one-way."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable

from meadow.closeable import Closeable

_PIECE = 16 * 1024


class TcpProxy(Closeable):
    """Carries connections from a free port on loopback to another; knows nothing of what they say.

    `deaf` while answers are swallowed, `cut` while nobody gets through; `bytes_per_second` (0: as
    fast as it goes) is each connection's, either way.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.bytes_per_second = 0.0
        self.cut = self.deaf = False
        self.swallowed = 0
        """Bytes of answers that nobody got."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join()

    def hang_up(self) -> None:
        """End all connections; new ones are taken unless `cut`."""
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=(near,))
            self._threads.append(thread)
            thread.start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if self.cut or self._closed:
                return
            with socket.create_connection(("127.0.0.1", self.target_port)) as far:
                with self._lock:
                    self._open |= {near, far}
                try:
                    self._both_ways(near, far)
                finally:
                    with self._lock:
                        self._open -= {near, far}

    def _both_ways(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far.sendall)
            ready.register(far, selectors.EVENT_READ, self._hearing(near.sendall))
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(_PIECE)  # type: ignore[union-attr]
                    if not data:
                        return
                    key.data(data)
                    if rate := self.bytes_per_second:
                        time.sleep(len(data) / rate)  # the wire itself takes this long

    def _hearing(self, send: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def maybe(data: bytes) -> None:
            if self.deaf:
                self.swallowed += len(data)
            else:
                send(data)

        return maybe
