"""What a participant's daemon is doing and has done, also where it does not run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, TrainerError
from ..file_lock import is_held
from .home import LOCK, OUTGOING, PAUSED, SOCKET, terms_in
from .membership import Membership
from .outgoing_log import Entry, read
from .trainer_link import STATUS, TrainerLink

_PATIENCE = 1.0  # seconds for the trainer's answer


def status_of(folder: Path) -> dict[str, Any]:
    """The trainer's own status where it answers, and what the folder says in any case.

    Raises JournalError where the log was changed.
    """
    membership = Membership.load(folder)
    entries = read(folder / OUTGOING) if (folder / OUTGOING).exists() else []
    found = {
        "name": membership.name,
        "folder": str(folder),
        "addresses": list(membership.addresses),
        "daemon": is_held(folder / LOCK),
        "trainer": False,
        "paused": (folder / PAUSED).exists(),
        "certificate_expires": _expires(membership),
        "sent": _sent(entries),
        "finished": _finished(folder, entries),
    }
    return found | _trainer(folder) if found["daemon"] else found


def _trainer(folder: Path) -> dict[str, Any]:
    """The trainer's word; nothing while it is being started."""
    try:
        with TrainerLink(folder / SOCKET, _PATIENCE) as link:
            return {**json.loads(link.call(STATUS)), "trainer": True}
    except TrainerError:
        return {}


def _expires(membership: Membership) -> float:
    """When the certificate ends (Unix seconds); 0 where there is none."""
    try:
        return membership.lifetime()[1]
    except FormatError:
        return 0.0


def _sent(entries: Sequence[Entry]) -> dict[str, Any]:
    """How much has left, by the log."""
    last = entries[-1].time if entries else 0.0
    return {"messages": len(entries), "bytes": sum(e.bytes for e in entries), "last": last}


def _finished(folder: Path, entries: Sequence[Entry]) -> bool:
    """Whether the result of the run's last round was measured here: nothing more will be asked."""
    try:
        terms = terms_in(folder)
    except (ConfigError, FormatError):  # not agreed yet, or of another meadow: `run` says so
        return False
    last = "evaluate", terms.run, terms.config.rounds.count
    return any((entry.kind, entry.run, entry.round) == last for entry in entries)


def require_running(folder: Path) -> None:
    """Raise ConfigError unless the daemon of this folder runs."""
    if not is_held(folder / LOCK):
        raise ConfigError("this participant's daemon is not running", "`meadow client` starts it")
