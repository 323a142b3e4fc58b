"""Slots and memory for adapters: never taken from who uses them, and never more than allowed."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.errors import AdapterError
from meadow.peft_adapters.serving_slots import Packed, Place
from meadow.server.serving.adapter_cache import AdapterCache
from meadow.server.serving.served import Served
from meadow.server.serving.slot_table import SlotTable

PATIENCE = 30.0
COUNT = 3


class Model:
    """What a slot table should do, said another way: a list, the oldest use first."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.references: dict[str, int] = {}
        self.pinned: set[str] = set()

    def victim(self, rank: int) -> str | None:
        own = [digest for digest in self.order if rank_of(digest) == rank]
        if len(own) < COUNT:
            return ""
        idle = (d for d in own if not self.references.get(d) and d not in self.pinned)
        return next(idle, None)


def rank_of(digest: str) -> int:
    return 8 if digest < "f" else 64


DIGESTS = st.sampled_from("abcdefghij")
EVENTS = st.tuples(st.sampled_from(["take", "take", "give", "pin", "unpin"]), DIGESTS)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(EVENTS, max_size=60))
def test_the_least_recently_used_slot_that_nobody_needs_is_given_up(
    events: list[tuple[str, str]],
) -> None:
    table, model = SlotTable(COUNT), Model()
    for kind, digest in events:
        rank = rank_of(digest)
        if kind == "take":
            victim = "" if digest in model.order else model.victim(rank)
            assert table.has_room(digest, rank) == (victim is not None)
            if victim is None:
                continue
            place, new = table.take(digest, rank)
            assert new == (digest not in model.order) and place.rank == rank
            if victim:
                model.order.remove(victim)
                model.pinned.discard(victim)
            model.order = [d for d in model.order if d != digest] + [digest]
            model.references[digest] = model.references.get(digest, 0) + 1
        elif kind == "give" and model.references.get(digest):
            table.give(digest)
            model.references[digest] -= 1
        elif kind in ("pin", "unpin"):
            table.pin(digest, kind == "pin")
            if digest in model.order:
                (model.pinned.add if kind == "pin" else model.pinned.discard)(digest)
        places = {d: table.place(d) for d in "abcdefghij" if table.place(d) is not None}
        assert places.keys() == set(model.order)
        assert len(set(places.values())) == len(places) == table.used
        assert all(place is not None and place.slot < COUNT for place in places.values())


def test_hits_misses_and_evictions_are_counted() -> None:
    table = SlotTable(1)
    assert table.take("a", 8) == (Place(8, 0), True)
    assert table.take("a", 8) == (Place(8, 0), False)
    assert not table.has_room("b", 8) and table.has_room("b", 64)
    table.give("a")
    assert not table.has_room("b", 8)  # it is still referred to once
    table.give("a")
    assert table.take("b", 8) == (Place(8, 0), True)
    assert (table.hits, table.misses, table.evictions) == (1, 2, 1)


def served(number: int) -> Served:
    return Served(f"a{number}", "v1", f"{number:064x}")


BYTES = 80  # of an adapter below


def packed(number: int) -> Packed:
    return Packed(8, torch.full((10,), float(number)), torch.zeros(10), frozenset())


class Loads:
    """A cache of so many adapters, and what its loader has said."""

    def __init__(self, adapters: float, read: Any = None) -> None:
        self.heard: queue.Queue[tuple[Served, bool, str]] = queue.Queue()
        self.cache = AdapterCache(
            read or (lambda model: packed(int(model.digest, 16))),
            int(adapters * BYTES),
            lambda *what: self.heard.put(what),
        )

    def __enter__(self) -> Loads:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()

    def hold(self, number: int) -> None:
        if not self.cache.hold(served(number)):
            assert self.heard.get(timeout=PATIENCE) == (served(number), True, "")


def test_what_is_held_stays_and_the_least_recently_used_goes() -> None:
    with Loads(2) as loads:
        loads.hold(1)
        loads.hold(2)
        loads.cache.give(served(1))
        loads.hold(3)  # 1 is the only one that nobody holds
        assert loads.cache.peek(served(1)) is None
        assert loads.cache.get(served(2)).a[0] == 2 and loads.cache.get(served(3)).a[0] == 3
        stats = loads.cache.stats()
        assert (stats.bytes, stats.misses, stats.evictions) == (2 * BYTES, 3, 1)
        assert loads.cache.hold(served(2)) and loads.cache.stats().hits == 1


def test_loading_waits_for_room_and_never_takes_more() -> None:
    with Loads(1) as loads:
        loads.hold(1)
        assert not loads.cache.hold(served(2))
        with pytest.raises(queue.Empty):
            loads.heard.get(timeout=0.2)
        assert loads.cache.stats().bytes == BYTES
        loads.cache.give(served(1))
        assert loads.heard.get(timeout=PATIENCE) == (served(2), True, "")
        assert loads.cache.stats().bytes == BYTES


def test_each_who_asks_while_it_loads_holds_it() -> None:
    begun = threading.Event()

    def read(model: Served) -> Packed:
        assert begun.wait(PATIENCE)
        return packed(1)

    with Loads(1, read) as loads:
        assert [loads.cache.hold(served(1)) for _ in range(3)] == [False] * 3
        begun.set()
        assert {loads.heard.get(timeout=PATIENCE) for _ in range(3)} == {(served(1), True, "")}
        for _ in range(2):
            loads.cache.give(served(1))
        assert not loads.cache.hold(served(2))
        with pytest.raises(queue.Empty):  # the third still holds it
            loads.heard.get(timeout=0.2)
        loads.cache.give(served(1))
        loads.heard.get(timeout=PATIENCE)


def test_a_warm_adapter_is_there_for_the_next_and_held_by_nobody() -> None:
    with Loads(1) as loads:
        loads.cache.warm(served(1))
        assert loads.heard.get(timeout=PATIENCE) == (served(1), False, "")
        assert loads.cache.peek(served(1)) is not None
        loads.hold(2)
        assert loads.cache.peek(served(1)) is None


@pytest.mark.parametrize("error", [AdapterError("it is broken"), ValueError("a defect")])
def test_what_cannot_be_loaded_is_told_and_the_next_is_loaded(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def read(model: Served) -> Packed:
        if model == served(1):
            raise error
        return packed(2)

    with Loads(1, read) as loads:
        assert not loads.cache.hold(served(1))
        _, held, told = loads.heard.get(timeout=PATIENCE)
        assert held and str(error) in told
        loads.hold(2)


def test_an_adapter_larger_than_the_bound_is_refused() -> None:
    with Loads(0.5) as loads:
        assert not loads.cache.hold(served(1))
        assert "larger than the cache" in loads.heard.get(timeout=PATIENCE)[2]


def test_closing_ends_a_load_that_waits_for_room() -> None:
    loads = Loads(1)
    loads.hold(1)
    assert not loads.cache.hold(served(2))
    loads.cache.close()
    assert loads.cache.stats().bytes == BYTES and loads.cache.peek(served(2)) is None
