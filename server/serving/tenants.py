"""Who asks, what they may ask for, and how much of it.

A tenant is an API key; the engine shares its time out among tenants.  Without a file of keys there
is one tenant, who may do everything.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import MeadowError, StorageError
from .api_keys import SCOPES, ApiKey, Scope, key_digest, key_id, read_keys
from .openai_errors import ApiError

log = logging.getLogger(__name__)

ANYONE = ApiKey(id="", name="anyone", digest="", scopes=SCOPES)
_NOBODY = key_digest("")
_MINUTE = 60.0


@dataclass
class _Use:
    """A bucket of requests that fills with time, and how many answers are being made."""

    left: float
    since: float
    at_once: int = field(default=0)


class Place:
    """One request of a key, while it is being answered."""

    def __init__(self, key: ApiKey, use: _Use) -> None:
        self._key, self._use = key, use
        self.taken = 0

    def take(self, answers: int) -> None:
        """Make room for so many answers.  ApiError: 400 for more than the key ever has, 429 for
        more than it has now."""
        most = self._key.at_once
        if most and answers > most:
            raise ApiError(400, f"this key may ask for {most} answers at once, not {answers}", "n")
        if most and self._use.at_once + answers > most:
            raise ApiError(429, f"this key may ask for {most} answers at once", retry_after=1.0)
        self._use.at_once += answers
        self.taken += answers


class Tenants:
    """Used on the event loop's thread."""

    def __init__(
        self, path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`path` is the file of keys, read again whenever it changes.  Raises ConfigError."""
        self._path, self._clock = path, clock
        self._keys: dict[str, ApiKey] = {}
        self._seen: tuple[int, ...] = ()
        self._uses: dict[str, _Use] = {}
        if path is not None:
            self._seen = _state(path)
            self._keys = {key.id: key for key in read_keys(path)}

    @property
    def are_known(self) -> bool:
        """Whether callers need keys."""
        return self._path is not None

    def caller(self, authorization: str | None, scope: Scope) -> ApiKey:
        """Whose key a request carries.  ApiError: 401 for no or a wrong one, 403 for its scope."""
        if self._path is None:
            return ANYONE
        self._refresh(self._path)
        scheme, _, text = (authorization or "").partition(" ")
        key, text = self._keys.get(key_id(text.strip())), text.strip()
        digest = key.digest if key is not None else _NOBODY
        same = hmac.compare_digest(key_digest(text), digest)
        if scheme.lower() != "bearer" or key is None or not same:
            raise ApiError(401, "no valid API key: send `Authorization: Bearer KEY`")
        if scope not in key.scopes:
            raise ApiError(403, f"this key is not for {scope}")
        return key

    @contextmanager
    def admitted(self, key: ApiKey) -> Iterator[Place]:
        """One request, for as long as it takes.  ApiError (429) where the key's rate refuses."""
        use = self._uses.setdefault(key.id, _Use(key.per_minute, self._clock()))
        self._count(key, use)
        place = Place(key, use)
        try:
            yield place
        finally:
            use.at_once -= place.taken

    def _count(self, key: ApiKey, use: _Use) -> None:
        """Take one request out of the bucket, which holds a minute's."""
        if not key.per_minute:
            return
        now, rate = self._clock(), key.per_minute / _MINUTE
        use.left = min(float(key.per_minute), use.left + (now - use.since) * rate)
        use.since = now
        if use.left < 1:
            raise ApiError(
                429,
                f"this key may send {key.per_minute} requests a minute",
                retry_after=(1 - use.left) / rate,
            )
        use.left -= 1

    def _refresh(self, path: Path) -> None:
        """Take up a changed file.  One that cannot be used changes nothing: the keys that are
        known go on being the only ones."""
        try:
            if (now := _state(path)) == self._seen:
                return
            self._keys = {key.id: key for key in read_keys(path)}
            self._seen = now
        except StorageError as error:  # of this moment, perhaps: the next request tries again
            log.error("the keys cannot be read: %s", error)
        except MeadowError as error:
            self._seen = now
            log.error("the keys stay as they were: %s", error)


def _state(path: Path) -> tuple[int, ...]:
    """What changes when the file does; nothing where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode
