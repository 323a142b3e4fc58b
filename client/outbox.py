"""The participant's durable outbox: an answer is computed once and sent as often as it takes.

A client records its payload together with the memory that goes with it, in one file that appears
whole or not at all, before it sends anything.  After a crash, and whenever the coordinator asks
again, it sends the recorded bytes; so a contribution is neither recomputed nor counted twice.

One file per answer, not a database: a record writes each byte once, in half the time that a
commit of the same bytes takes, and the clients of a node share no lock.  The files are
`<folder>/<run>/<SHA-256 of the client's name>/<round>.record`: a line of text with the format
version, the payload's size and a digest of everything, then payload and memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..canonical_json import canonical
from ..errors import FormatError, JournalError
from ..store import Disk, digest_of, explained

FORMAT = 1
_SEAL = re.compile(rb"meadow outbox (\d{1,9}) (\d{1,18}) [0-9a-f]{64}")


class Outbox:
    """The answers of one client in one run.  It holds no open file and needs no closing."""

    def __init__(self, folder: Path, client: str, run_id: str, disk: Disk | None = None) -> None:
        """Raises FormatError for a run id, which comes from outside, that is not hexadecimal."""
        if not re.fullmatch("[0-9a-f]{1,64}", run_id):
            raise FormatError(f"the run id {run_id[:80]!r} is not hexadecimal")
        self._client = client
        self._run = run_id
        self._folder = folder / run_id / digest_of(client.encode())[:32]
        self._disk = disk or Disk()

    def pending(self, round: int) -> bytes | None:
        """The payload recorded for a round: send exactly this, compute nothing.

        None if nothing was recorded.  Raises JournalError if the record is damaged, FormatError
        if another version of meadow wrote it.
        """
        if round not in self._rounds():
            return None
        self._disk.confirm(self._folder)
        return self._read(round)[0]

    def memory(self, before_round: int) -> bytes | None:
        """The client's memory after its newest answer to a round before this one, if any."""
        earlier = [number for number in self._rounds() if number < before_round]
        return self._read(max(earlier))[1] if earlier else None

    def record(self, round: int, payload: bytes, memory: bytes) -> None:
        """Keep an answer and the memory that follows from it; durable on return.

        Raises ValueError if the round has another answer already: send that one.
        """
        rounds = self._rounds()
        if round in rounds:
            if self._read(round) != (payload, memory):
                raise ValueError(f"round {round} of {self._client} has its answer already")
            self._disk.confirm(self._folder)
            return
        if not rounds:
            self._disk.folder(self._folder.parent)
            self._disk.folder(self._folder)
        seal = self._seal(round, len(payload), payload + memory)
        self._disk.write(self._path(round), b"".join([seal, b"\n", payload, memory]))

    def acknowledge(self, round: int) -> None:
        """The journal has this round's answer: delete what is older.

        The answer itself stays until a later one is acknowledged: its memory is needed for the
        next round, and a coordinator that asks again gets the same bytes.
        """
        for path in self._files("*.record*"):  # drafts that a crash left are named alike
            if _number(path) < round:
                self._disk.delete(path)

    def settle(self, before_round: int) -> None:
        """Round `before_round` has begun, so all earlier ones are closed: delete what is older
        than the newest answer to one of them, whose memory is still needed.

        A client that is sampled rarely keeps its memory; the disk holds two records at most.
        """
        earlier = [number for number in self._rounds() if number < before_round]
        if len(earlier) > 1:
            self._disk.confirm(self._folder)  # the answer that stays may be a crash's last deed
            self.acknowledge(max(earlier))

    def _path(self, round: int) -> Path:
        return self._folder / f"{round:08d}.record"

    def _files(self, pattern: str) -> list[Path]:
        with explained(self._folder):
            return sorted(self._folder.glob(pattern))

    def _rounds(self) -> list[int]:
        return [_number(path) for path in self._files("*.record")]

    def _seal(self, round: int, size: int, body: bytes) -> bytes:
        """The first line of a record whose payload is the first `size` bytes of `body`."""
        owner = canonical([self._run, self._client, round, size]).encode()
        return f"meadow outbox {FORMAT} {size} {digest_of(owner + body)}".encode()

    def _read(self, round: int) -> tuple[bytes, bytes]:
        """Payload and memory of a round, if the file is exactly what `record` wrote."""
        path = self._path(round)
        with explained(path):
            seal, _, body = path.read_bytes().partition(b"\n")
        found = _SEAL.fullmatch(seal)
        if found and int(found[1]) != FORMAT:
            version = found[1].decode()
            raise FormatError(f"{path} has outbox format {version}, this meadow reads {FORMAT}")
        size = int(found[2]) if found else 0
        if seal != self._seal(round, size, body):
            raise JournalError(f"{path} is damaged", "restore it, or delete it to answer anew")
        return body[:size], body[size:]


def _number(path: Path) -> int:
    """The round that a record, or the draft of one, belongs to."""
    return int(path.name.partition(".")[0])
