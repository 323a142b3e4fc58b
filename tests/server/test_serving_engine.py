"""The engine as its callers meet it: from any thread, refusing, draining, and breaking down."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from served_models import (
    RANKS,
    all_sites,
    model_of,
    random_tree,
    small_base,
    tokens_of,
    windowed_base,
)

from meadow.errors import (
    AdapterError,
    ConfigError,
    ModelError,
    OverloadedError,
    ServingError,
    StoppedError,
    TooLongError,
)
from meadow.peft_adapters.adapter_reader import Adapter
from meadow.peft_adapters.base_model import Base
from meadow.server.serving.engine import AdapterLoad, Engine, EngineOptions, Ticket
from meadow.server.serving.requests import Event, Failed, Finished, Job, Sampling
from meadow.server.serving.served import Served

PATIENCE = 60.0


class Shelf:
    """Adapters of random numbers; number 13 cannot be read."""

    warm: Callable[[Served], None] | None = None

    def __init__(self, base: Base) -> None:
        self._sites = all_sites(base)
        self.reads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, model: Served) -> Adapter:
        assert self.gate.wait(PATIENCE)
        self.reads.append(model.name)
        number = int(model.digest, 16)
        if number == 13:
            raise AdapterError("a13 was changed after it was verified")
        rank = RANKS[number % len(RANKS)]
        return Adapter(random_tree(self._sites, rank, number), 2.0, rank, "")


class Asked:
    """A request and what it was told."""

    def __init__(self, engine: Engine, sampling: Sampling, model: int, tenant: str = "t") -> None:
        self.events: list[Event] = []
        self.heard: queue.Queue[Event] = queue.Queue()
        self.ended = threading.Event()
        job = Job((3, 4, 5), sampling, model_of(model), tenant)
        self.ticket: Ticket = engine.submit(job, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self.heard.put(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def last(self) -> Finished | Failed:
        assert self.ended.wait(PATIENCE)
        last = self.events[-1]
        assert isinstance(last, Finished | Failed)
        return last


def greedy(tokens: int) -> Sampling:
    return Sampling(tokens, temperature=0, ignore_eos=True)


ENDLESS = greedy(90)


@contextmanager
def opened(**options: Any) -> Iterator[tuple[Engine, Any]]:
    base = small_base()
    shelf: Any = Shelf(base)
    with Engine(base, shelf, EngineOptions(**options)) as engine:
        yield engine, shelf


def test_many_threads_get_what_each_would_alone() -> None:
    with opened(max_rows=3, slots=1) as (engine, _):
        alone = {}
        for model in range(6):
            asked = Asked(engine, greedy(8), model)
            asked.last()
            alone[model] = tokens_of(asked.events)
        assert len({tuple(tokens) for tokens in alone.values()}) == 6
        told: queue.Queue[tuple[int, Asked]] = queue.Queue()

        def ask(model: int) -> None:
            for _ in range(3):
                asked = Asked(engine, greedy(8), model, f"{model}")
                asked.last()
                told.put((model, asked))

        threads = [threading.Thread(target=ask, args=[model]) for model in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not told.empty():
            model, asked = told.get()
            assert tokens_of(asked.events) == alone[model]


def test_figures() -> None:
    with opened(max_rows=2, slots=2) as (engine, shelf):
        first = Asked(engine, greedy(5), 1)
        first.last()
        second = Asked(engine, greedy(4), 1)
        second.last()
        assert engine.drain(PATIENCE)
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generation_tokens) == (6, 2, 9)
    assert (stats.slot_hits, stats.slot_misses, stats.slots_used, stats.slots) == (1, 1, 1, 2)
    assert (stats.cache_hits, stats.cache_misses) == (1, 1) and stats.cache_bytes > 0
    assert stats.finished == {"length": 2} and stats.adapters == ()
    assert (stats.running, stats.waiting, stats.kv_used, stats.max_rows) == (0, 0, 0, 2)
    assert shelf.reads == ["a1"]


def test_what_runs_and_waits_is_told_by_adapter() -> None:
    with opened(max_rows=1) as (engine, _):
        asked = [Asked(engine, ENDLESS, 1)]
        asked[0].heard.get(timeout=PATIENCE)
        asked += [Asked(engine, ENDLESS, 1), Asked(engine, ENDLESS, 0)]
        while engine.stats().waiting < 2:
            asked[0].heard.get(timeout=PATIENCE)
        loads = engine.stats().adapters
        assert AdapterLoad("a1@v1", 1, 1) in loads and AdapterLoad("small", 0, 1) in loads
        for one in asked:
            one.ticket.cancel()
            assert one.last().reason == "abort"  # type: ignore[union-attr]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    with opened(max_rows=1, max_waiting=2) as (engine, shelf):
        shelf.gate.clear()  # nothing is loaded: all wait
        waiting = [Asked(engine, greedy(2), 1) for _ in range(2)]
        with pytest.raises(OverloadedError) as caught:
            Asked(engine, greedy(2), 1)
        assert 1 <= caught.value.retry_after <= 60
        shelf.gate.set()
        assert all(isinstance(asked.last(), Finished) for asked in waiting)
        assert isinstance(Asked(engine, greedy(2), 1).last(), Finished)


@pytest.mark.parametrize(
    "taken", [{"flood": 7, "second": 3, "third": 2}, {"": 12}], ids=["keys", "no keys"]
)
def test_one_tenants_flood_leaves_others_places_in_the_queue(taken: dict[str, int]) -> None:
    """Each takes as many as are left then; without keys there is nobody to leave any to."""
    with opened(max_rows=1, max_waiting=12) as (engine, shelf):
        shelf.gate.clear()  # nothing is loaded: all wait
        found: Counter[str] = Counter()
        for tenant in taken:
            with pytest.raises(OverloadedError) as caught:
                while found[tenant] <= 12:
                    Asked(engine, greedy(2), 1, tenant)
                    found[tenant] += 1
            assert 1 <= caught.value.retry_after <= 60
        shelf.gate.set()
        assert found == taken
        assert engine.drain(PATIENCE)
        assert engine.stats().finished == {"length": 12}


def test_too_long_is_refused_with_the_limit() -> None:
    with opened(max_length=20) as (engine, _):
        with pytest.raises(TooLongError) as caught:
            Asked(engine, greedy(18), 0)
        assert caught.value.limit == engine.max_length == 20
        assert isinstance(Asked(engine, greedy(17), 0).last(), Finished)
        with pytest.raises(ServingError):
            engine.submit(Job((), greedy(1), model_of(0), "t"), lambda event: None)


def test_an_adapter_that_cannot_be_read_fails_its_requests_alone() -> None:
    with opened() as (engine, _):
        bad, good = Asked(engine, greedy(4), 13), Asked(engine, greedy(4), 2)
        assert bad.last() == Failed("a13 was changed after it was verified")
        assert isinstance(good.last(), Finished)


def test_a_request_whose_adapter_is_loading_can_be_cancelled() -> None:
    with opened() as (engine, shelf):
        shelf.gate.clear()
        asked = Asked(engine, greedy(4), 1)
        asked.ticket.cancel()
        assert asked.last() == Finished("abort", "", 3, 0, 0)
        shelf.gate.set()
        assert isinstance(Asked(engine, greedy(4), 1).last(), Finished)


def test_draining_answers_what_is_there_and_takes_nothing_new() -> None:
    with opened(max_rows=1) as (engine, _):
        asked = [Asked(engine, greedy(30), model) for model in (0, 1, 2)]
        assert engine.drain(PATIENCE)
        assert [a.last().reason for a in asked] == ["length"] * 3  # type: ignore[union-attr]
        with pytest.raises(StoppedError):
            Asked(engine, greedy(1), 0)


def test_drained_is_not_said_before_it_is_true() -> None:
    """Also right after a request was taken, before anybody has looked at it."""
    with opened() as (engine, _):
        for _ in range(30):
            asked = Asked(engine, greedy(1), 0)
            with engine._changed:  # as `drain`, which would let nothing in any more
                assert engine._changed.wait_for(engine._is_idle, PATIENCE)
            assert asked.events


def test_closing_aborts_what_is_left_and_gives_the_base_back() -> None:
    base = small_base()
    ids = torch.tensor([[3, 4, 5]])
    before = base.model(input_ids=ids).logits
    names = [name for name, _ in base.model.named_modules()]
    shelf: Any = Shelf(base)
    with Engine(base, shelf, EngineOptions(max_rows=1)) as engine:
        asked = [Asked(engine, ENDLESS, model) for model in (1, 2, 3)]
        asked[0].heard.get(timeout=PATIENCE)
    assert [a.last().reason for a in asked] == ["abort"] * 3  # type: ignore[union-attr]
    assert [name for name, _ in base.model.named_modules()] == names
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_an_engine_that_breaks_down_tells_everybody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(max_rows=1) as (engine, _):
        asked = [Asked(engine, ENDLESS, model) for model in (0, 1)]
        asked[0].heard.get(timeout=PATIENCE)

        def fail(*_: object) -> None:
            raise RuntimeError("no memory left")

        monkeypatch.setattr(engine._runner, "run", fail)
        for one in asked:
            last = one.last()
            assert isinstance(last, Failed) and "no memory left" in last.error
        with pytest.raises(StoppedError, match="no memory left"):
            while True:
                Asked(engine, greedy(1), 0)
    assert "broke down" in caplog.text


def test_a_version_is_in_its_slot_before_anybody_asks() -> None:
    with opened(slots=1) as (engine, shelf):
        assert shelf.warm is not None
        shelf.warm(model_of(1))
        assert shelf.reads == ["a1"]
        assert isinstance(Asked(engine, greedy(2), 1).last(), Finished)
        assert engine.drain(PATIENCE)
        assert engine.stats().slot_hits == 1


def test_a_pinned_adapter_keeps_its_slot() -> None:
    with opened(slots=2, pinned=("a4",)) as (engine, _):
        for model in (4, 8, 12, 16, 4):  # all of rank 8
            assert isinstance(Asked(engine, greedy(2), model).last(), Finished)
        assert engine.drain(PATIENCE)
        stats = engine.stats()
    assert (stats.slot_hits, stats.slot_evictions) == (1, 2)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 1}, {"max_length": 97}, {"kv_tokens": 50}, {"max_rows": 0}, {"slots": 0},
     {"prefill_tokens": 0}, {"max_waiting": 0}, {"slots": 1, "pinned": ("a",)}],
)  # fmt: skip
def test_bounds_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError), opened(**options):
        pass


def test_a_window_of_attention_is_kept() -> None:
    """Mistral's: each token sees the last few alone, in prompts, parts of them, and decoding."""
    base = windowed_base(6)
    model: Any = base.model
    prompt = torch.randint(3, 60, (1, 17))
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, 17:].tolist()  # fmt: skip
    for prefill in (4, 64):
        shelf: Any = Shelf(base)
        with Engine(base, shelf, EngineOptions(prefill_tokens=prefill, max_rows=2)) as engine:
            heard: list[Event] = []
            ended = threading.Event()

            def hear(event: Event, heard: Any = heard, ended: Any = ended) -> None:
                heard.append(event)
                if isinstance(event, Finished | Failed):
                    ended.set()

            job = Job(tuple(prompt[0].tolist()), greedy(12), model_of(0), "t")
            engine.submit(job, hear)
            assert ended.wait(PATIENCE)
        assert tokens_of(heard) == expected


def test_a_base_that_the_batch_cannot_hold_is_refused_and_left_as_it_was() -> None:
    base = small_base()
    config: Any = base.model.config
    config.num_key_value_heads = 4  # another shape than its layers have
    with pytest.raises(ModelError, match="cannot be served"):
        Engine(base, Shelf(base), EngineOptions())  # type: ignore[arg-type]
    assert config._attn_implementation != "meadow_packed"
    assert not any("base" in name for name, _ in base.model.named_modules())
