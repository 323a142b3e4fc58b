"""Which adapter is in which slot: references, pins, and the least recently used one to give up."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ...peft_adapters.serving_slots import Place


@dataclass
class _Entry:
    place: Place
    references: int = 0
    pinned: bool = False


class SlotTable:
    """`count` slots for each rank.  A slot that is referred to, or pinned, is never given away."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by digest, oldest use first
        self._free: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        """Slots that hold an adapter."""
        return len(self._entries)

    @property
    def total(self) -> int:
        """Slots of all ranks that occurred."""
        return self.count * len(self._free)

    def place(self, digest: str) -> Place | None:
        """Where an adapter is ready, if it is."""
        entry = self._entries.get(digest)
        return None if entry is None else entry.place

    def has_room(self, digest: str, rank: int) -> bool:
        """Whether `take` can succeed."""
        return digest in self._entries or bool(self._free_of(rank)) or self._oldest(rank) != ""

    def take(self, digest: str, rank: int) -> tuple[Place, bool]:
        """Refer to an adapter's slot, and whether it has yet to be filled.  There must be room."""
        new = digest not in self._entries
        self.hits, self.misses = self.hits + (not new), self.misses + new
        if new:
            self._entries[digest] = _Entry(Place(rank, self._make_room(rank)))
        entry = self._entries[digest]
        self._entries.move_to_end(digest)
        entry.references += 1
        return entry.place, new

    def give(self, digest: str) -> None:
        """Refer to it no more; it stays until its slot is needed."""
        self._entries[digest].references -= 1

    def drop(self, digest: str) -> None:
        """Its new slot could not be filled, and is free again."""
        place = self._entries.pop(digest).place
        self._free_of(place.rank).append(place.slot)

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Keep an adapter in its slot, whoever uses it; does nothing for one in none."""
        if entry := self._entries.get(digest):
            entry.pinned = pinned

    def _make_room(self, rank: int) -> int:
        free = self._free_of(rank)
        if free:
            return free.pop()
        self.evictions += 1
        return self._entries.pop(self._oldest(rank)).place.slot

    def _oldest(self, rank: int) -> str:
        return next(
            (
                digest
                for digest, entry in self._entries.items()
                if entry.place.rank == rank and not entry.references and not entry.pinned
            ),
            "",
        )

    def _free_of(self, rank: int) -> list[int]:
        return self._free.setdefault(rank, list(reversed(range(self.count))))
