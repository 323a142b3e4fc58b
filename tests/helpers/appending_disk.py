"""A faulty disk for files that are appended to: what they held before is durable."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from faulty_disk import Faulty

from meadow.store import Disk


class Appending(Faulty):
    """Has a fault at a chosen step, where a file may have had content before.

    A power cut leaves half of what was not synced; or zeros, where it cuts the writing itself.
    """

    def fill(self, file: BinaryIO, data: bytes) -> None:
        name, start, half = self.name(Path(file.name)), file.tell(), data[: len(data) // 2]
        at = start + len(half)
        self.undo.append((f"content {name}", lambda copy: os.truncate(copy / name, at)))

        def full() -> None:
            Disk.fill(self, file, half)
            raise OSError(errno.ENOSPC, "injected")

        self.step(lambda: Disk.fill(self, file, data), lambda: Disk.fill(self, file, half), full)
