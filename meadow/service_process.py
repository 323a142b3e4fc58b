"""What a deployment's processes have in common: they log to standard error, serve until they are
asked to end, and name a mistake of their user in one line.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MeadowError

log = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask a process to end."""


@contextmanager
def service_process() -> Iterator[None]:
    """The whole of a process: a MeadowError in the block becomes a line in its log and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        yield
    except MeadowError as error:
        log.error("%s", error)
        raise SystemExit(2) from error


def asked_to_end() -> asyncio.Event:
    """Is set once the process is asked to end; for the running loop of a main thread."""
    ended = asyncio.Event()
    for number in ENDING:
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    return ended
