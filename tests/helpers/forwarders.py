"""A participant's machine whose forwarder runs, to be asked as a SuperNode asks it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gateways import RUN, Person, Quick, Site, options_of

from meadow.client.forwarder import Forwarder


@dataclass
class Local:
    """A participant's machine with a forwarder that runs."""

    place: Site
    person: Person
    folder: Path
    forwarder: Forwarder
    http: httpx.Client
    clock: Any

    @property
    def base(self) -> str:
        return f"https://127.0.0.1:{self.forwarder.port}"

    def ask(self, path: str = RUN, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """A request as the SuperNode makes it."""
        flower = self.person.flower.headers(self.clock()) if headers is None else headers
        return self.http.post(self.base + path, content=b"question", headers=flower)


@contextmanager
def local(place: Site, person: Person, folder: Path, clock: Any = time.time) -> Iterator[Local]:
    forwarder = Forwarder(options_of(folder), Quick(), clock)
    running = forwarder.running()
    place.run(running.__aenter__())
    try:
        trusted = ssl.create_default_context(cafile=str(folder / "forwarder-authority.pem"))
        with httpx.Client(verify=trusted, timeout=30) as http:
            yield Local(place, person, folder, forwarder, http, clock)
    finally:
        place.run(running.__aexit__(None, None, None))
