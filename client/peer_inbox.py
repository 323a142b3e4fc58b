"""The folder into which `meadow peer introduce` drops introductions for a peer at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import RecordError
from ..store import Disk, explained
from ..strategies.chain import Outcome
from ..strategies.introductions import LARGEST
from ..strategies.ledger import Added, Kind
from ..strategies.records import Reason

SUFFIX = ".introduction"
_REFUSED = ".refused"

Publish = Callable[[Kind, bytes], Added]
Tell = Callable[[str], None]


class Inbox:
    """Takes each file once: what is accepted is deleted, what is refused is renamed and told."""

    def __init__(self, folder: Path, disk: Disk, publish: Publish, tell: Tell) -> None:
        self._folder, self._disk = folder, disk
        self._publish, self._tell = publish, tell
        self._waiting: set[str] = set()  # files that stay, and of which was told

    def read(self) -> None:
        """Take in what is there.  Raises StorageError where the folder cannot be read."""
        with explained(self._folder):
            paths = sorted(self._folder.glob(f"*{SUFFIX}"))
        self._waiting &= {path.name for path in paths}
        for path in paths:
            self._take(path)

    def _take(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
        except OSError as error:
            self._leave(path, f"cannot be read: {error.strerror}")
            return
        added = self._publish(Kind.INTRODUCTION, data)
        if added.outcome is not Outcome.REFUSED:
            self._disk.delete(path)
        elif _may_come_right(added.error):
            self._leave(path, f"waits: {added.error}")
        else:
            self._tell(f"{path.name} is refused: {added.error}")
            with explained(path):
                self._disk.rename(path, path.with_suffix(_REFUSED))

    def _leave(self, path: Path, why: str) -> None:
        if path.name not in self._waiting:
            self._waiting.add(path.name)
            self._tell(f"{path.name} {why}")


def _may_come_right(error: RecordError | None) -> bool:
    """Word of the introducer's own introduction may still be on its way."""
    return error is not None and error.reason is Reason.STRANGER
