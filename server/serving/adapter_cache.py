"""Adapters in memory, ready to fill a slot: loaded on a thread of their own, within a bound."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ...closeable import Closeable
from ...errors import AdapterError, MeadowError
from ...peft_adapters.serving_slots import Packed
from .served import Served

_LOG = logging.getLogger(__name__)


@dataclass
class _Entry:
    packed: Packed
    references: int = 0


@dataclass(frozen=True)
class CacheStats:
    """What is held, and how often it was asked for."""

    bytes: int
    hits: int
    misses: int
    evictions: int


class AdapterCache(Closeable):
    """At most `limit` bytes of adapters, and the one that is being loaded.

    What somebody holds stays; of the rest the least recently used goes first.  When all is held,
    loading waits until something is given back.
    """

    def __init__(
        self,
        read: Callable[[Served], Packed],
        limit: int,
        on_loaded: Callable[[Served, bool, str], None],
    ) -> None:
        """Both are called on the loader's thread.

        `on_loaded` is told, once for each `hold` that gave False and each `warm`, which
        adapter is there, whether it is held now, and what went wrong or "".
        """
        self.limit = limit
        self._read, self._on_loaded = read, on_loaded
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._wanted: deque[tuple[Served, bool]] = deque()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._load_all, name="meadow-adapters", daemon=True)
        self._thread.start()

    def hold(self, model: Served) -> bool:
        """Keep an adapter from now on; False where it is to be loaded first, see `on_loaded`."""
        with self._changed:
            if entry := self._entries.get(model.digest):
                self._hits += 1
                entry.references += 1
                self._entries.move_to_end(model.digest)
                return True
            self._misses += 1
            self._wanted.append((model, True))
            self._changed.notify_all()
            return False

    def warm(self, model: Served) -> None:
        """Load an adapter that somebody will ask for, and hold it for nobody."""
        with self._changed:
            self._wanted.append((model, False))
            self._changed.notify_all()

    def get(self, model: Served) -> Packed:
        """An adapter that the caller holds."""
        with self._changed:
            return self._entries[model.digest].packed

    def peek(self, model: Served) -> Packed | None:
        """An adapter, if it is there; it stays usable, whatever becomes of its place here."""
        with self._changed:
            entry = self._entries.get(model.digest)
            return None if entry is None else entry.packed

    def give(self, model: Served) -> None:
        """The caller holds it no more."""
        with self._changed:
            self._entries[model.digest].references -= 1
            self._changed.notify_all()

    def stats(self) -> CacheStats:
        with self._changed:
            return CacheStats(self._bytes, self._hits, self._misses, self._evictions)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _load_all(self) -> None:
        while (wanted := self._next()) is not None:
            model, held = wanted
            try:
                error = "" if self._load(model, held) else "the server is ending"
            except MeadowError as fault:
                error = str(fault)
            except Exception as fault:  # a defect: who asked is told, and the next one is loaded
                _LOG.exception("%s could not be loaded", model)
                error = f"{model} could not be loaded: {fault}"
            self._on_loaded(model, held, error)

    def _next(self) -> tuple[Served, bool] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closed)
            return None if self._closed else self._wanted.popleft()

    def _load(self, model: Served, held: bool) -> bool:
        with self._changed:
            known = model.digest in self._entries
        packed = None if known else self._read(model)
        with self._changed:
            if packed is not None and not self._insert(model.digest, packed):
                return False
            entry = self._entries[model.digest]
            entry.references += held
        return True

    def _insert(self, digest: str, packed: Packed) -> bool:
        if packed.bytes > self.limit:
            raise AdapterError(
                f"an adapter of {packed.bytes} bytes is larger than the cache of {self.limit}",
                "give the server more memory for adapters",
            )
        self._changed.wait_for(lambda: self._closed or self._make_room(packed.bytes))
        if not self._closed:
            self._entries[digest] = _Entry(packed)
            self._bytes += packed.bytes
        return not self._closed

    def _make_room(self, size: int) -> bool:
        """Evict what nobody holds until `size` bytes fit; whether they do."""
        idle = [digest for digest, entry in self._entries.items() if not entry.references]
        for digest in idle:
            if self._bytes + size <= self.limit:
                break
            self._bytes -= self._entries.pop(digest).packed.bytes
            self._evictions += 1
        return self._bytes + size <= self.limit
