"""A wire between participants and a coordinator that a test can cut, slow down, or make one-way."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time

from meadow.closeable import Closeable

_PIECE = 16 * 1024
_HANDSHAKE_TURNS = 2
"""In TLS 1.3 a caller greets, is answered, and then finishes and asks in one breath."""


class TcpProxy(Closeable):
    """Carries connections from a free port on loopback to another; knows nothing of what they say.

    `deaf` while answers are swallowed, those of a TLS handshake excepted; `cut` while nobody gets
    through; `bytes_per_second` (0: as fast as it goes) is each connection's, either way.
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
        turns, speaker = 0, far  # how often the caller has begun to speak
        with selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ)
            ready.register(far, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    source, target = (near, far) if key.fileobj is near else (far, near)
                    data = source.recv(_PIECE)
                    if not data:
                        return
                    turns, speaker = turns + (source is near and speaker is far), source
                    if source is far and self.deaf and turns >= _HANDSHAKE_TURNS:
                        self.swallowed += len(data)
                    else:
                        target.sendall(data)
                    if rate := self.bytes_per_second:
                        time.sleep(len(data) / rate)  # the wire itself takes this long
