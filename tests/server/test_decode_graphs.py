"""Recorded decoding steps say what computed ones say, and touch nothing else.

They are replayed from a tape of operations on fixed addresses, as a GPU replays a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served_models import (
    RANKS,
    Desk,
    all_sites,
    packed_adapter,
    random_tree,
    small_base,
    tokens_of,
    windowed_base,
)
from step_recorders import again, cpu_kernels, tape
from torch import Tensor

from meadow.errors import ConfigError, ModelError
from meadow.peft_adapters.base_model import Base
from meadow.peft_adapters.serving_slots import Packed, Place, has_kernels, pack, padded_rank
from meadow.server.serving import cuda_recorder, decode_graphs
from meadow.server.serving.cuda_recorder import CudaRecorder, check_recording
from meadow.server.serving.decode_graphs import DecodeGraphs, Recorder, Step, rounded
from meadow.server.serving.engine import Engine, EngineOptions
from meadow.server.serving.kv_rows import Owner, Row
from meadow.server.serving.model_runner import ModelRunner, Work
from meadow.server.serving.requests import Sampling
from meadow.server.serving.serve import ServeOptions, opened_front
from meadow.server.serving.tenants import Tenants

ROWS, LENGTH, SLOTS = 6, 21, 2
PLACES = [Place(8, 0), Place(8, 1), Place(16, 0), Place(64, 1)]
FINE = decode_graphs._ROWS, decode_graphs._POSITIONS
BASES = {"llama": small_base, "mistral": lambda: windowed_base(5)}


def doubled(base: Base) -> Base:
    """In float64, where what is left of a difference is a fault and no rounding."""
    return replace(base, model=base.model.double())


def adapter(place: Place, number: int) -> Packed:
    """One of the rank's adapters, of which every third leaves most layers out."""
    sites = tuple(small_sites())
    number = next(n for n in range(4 * number, 4 * number + 4) if rank_of(n) == place.rank)
    if number % 3:
        return packed_adapter(number, sites)
    rank = RANKS[number % len(RANKS)]
    few = [site for site in sites if "q_proj" in site.name or "down" in site.name]
    return pack(random_tree(few, rank, number), 2.0, rank, sites, torch.float32)


def rank_of(number: int) -> int:
    return padded_rank(RANKS[number % len(RANKS)])


def small_sites() -> Any:
    return all_sites(small_base())


class Pair:
    """A server that computes its steps by batched products, and one that replays them.

    Both are told the same, so that their rows lie at the same places.
    """

    def __init__(self, base: Callable[[], Base], recorder: Recorder = tape) -> None:
        size: Any = {"rows": ROWS, "length": LENGTH, "slots": SLOTS}
        self.computed = ModelRunner(doubled(base()), **size, kernels=False)
        self.replayed = ModelRunner(doubled(base()), **size, kernels=True, recorder=recorder)
        graphs = self.replayed.graphs
        assert graphs is not None
        self.graphs: DecodeGraphs = graphs
        self.graphs.patience = 0
        self.busy: list[tuple[Row, Row, Place | None]] = []
        self.steps = 0
        for place in PLACES:
            self.refill(place, 0)

    def close(self) -> None:
        self.computed.close()
        self.replayed.close()

    def refill(self, place: Place, number: int) -> None:
        for runner in (self.computed, self.replayed):
            runner.write(place, adapter(place, number))

    def begin(self, place: Place | None, text: Sequence[int]) -> None:
        if not self.computed.kv.free:
            return
        owner = Owner(str(place), "t")
        rows = [runner.kv.take(owner, text) for runner in (self.computed, self.replayed)]
        assert rows[0].index == rows[1].index and rows[0].tokens == rows[1].tokens
        new = text[len(rows[0].tokens) :]
        one, other = (
            runner.run([], [Work(row, place, new)])[1]
            for runner, row in zip((self.computed, self.replayed), rows, strict=True)
        )
        same(other, one)
        self.busy.append((rows[0], rows[1], place))

    def end(self, which: int, keep: bool) -> None:
        if self.busy:
            one, other, _ = self.busy.pop(which % len(self.busy))
            self.computed.kv.give(one, keep=keep)
            self.replayed.kv.give(other, keep=keep)

    def decode(self, who: Sequence[bool], tokens: Sequence[int]) -> None:
        """A step of some rows, where they have room; the others are idle, as are full ones."""
        chosen = [
            (busy, token)
            for busy, token, wanted in zip(self.busy, tokens, who, strict=False)
            if wanted and len(busy[0].tokens) < LENGTH
        ]
        if not chosen:
            return
        computed = [Work(one, place, [token]) for (one, _, place), token in chosen]
        replayed = [Work(other, place, [token]) for (_, other, place), token in chosen]
        kv, replays = self.replayed.kv, self.steps
        before = kv.data.clone()
        written = [(work.row.index, len(work.row.tokens)) for work in replayed]
        wanted = by_row(self.computed.run(computed, []))
        found = by_row(self.replayed.run(replayed, []))
        assert self.steps == replays + 1
        same(found, wanted)
        self._check_kept(before, written)

    def _check_kept(self, before: Tensor, written: Sequence[tuple[int, int]]) -> None:
        """Only what the step was to write is new, and it is right; all other bytes are as before,
        but for those of the scratch row."""
        data = self.replayed.kv.data
        for row, past in written:
            same(data[:, :, row, :, past], self.computed.kv.data[:, :, row, :, past])
            before[:, :, row, :, past] = data[:, :, row, :, past]
        assert torch.equal(data[:, :, :ROWS], before[:, :, :ROWS])


def by_row(answer: tuple[list[Work], Tensor]) -> Tensor:
    works, logits = answer
    assert len({work.row.index for work in works}) == len(works) == len(logits)
    return logits[sorted(range(len(works)), key=lambda at: works[at].row.index)]


def same(found: Tensor, wanted: Tensor) -> None:
    """To the rounding of float32, in which logits are told; sums have other orders."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module", params=BASES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With several sizes of steps for so few rows and tokens."""
    with pytest.MonkeyPatch.context() as patch, cpu_kernels():
        patch.setattr(decode_graphs, "_ROWS", 2)
        patch.setattr(decode_graphs, "_POSITIONS", 4)
        pair = Pair(BASES[request.param])
        run = pair.graphs.run

        def counted(batch: Sequence[Work], *, at_once: bool = False) -> Tensor | None:
            found = run(batch, at_once=at_once)
            pair.steps += found is not None
            return found

        patch.setattr(pair.graphs, "run", counted)
        yield pair
        pair.close()


TOKENS = st.integers(2, 40)
EVENTS = st.one_of(
    st.tuples(
        st.just("begin"),
        st.sampled_from([None, *PLACES]),
        st.lists(st.integers(2, 4), min_size=1, max_size=LENGTH),
    ),
    st.tuples(
        st.just("decode"),
        st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
        st.lists(TOKENS, min_size=ROWS, max_size=ROWS),
    ),
    st.tuples(
        st.just("decode"),
        st.just([True] * ROWS),
        st.lists(TOKENS, min_size=ROWS, max_size=ROWS),
    ),
    st.tuples(st.just("end"), st.integers(0, ROWS), st.booleans()),
    st.tuples(st.just("refill"), st.sampled_from(PLACES), st.integers(0, 5)),
)


@settings(max_examples=40, deadline=None)
@given(events=st.lists(EVENTS, min_size=5, max_size=40))
def test_replayed_steps_are_as_computed_ones_and_touch_nothing_else(
    pair: Pair, events: list[Any]
) -> None:
    """Rows join, leave and are idle; ranks and the base are mixed; prompts are read in between;
    slots are refilled; recordings come and go."""
    pair.graphs.most = 5
    for kind, *arguments in events:
        getattr(pair, kind)(*arguments)
        assert len(pair.graphs.recorded) <= 5
    while pair.busy:
        pair.end(0, keep=True)


def test_a_full_row_between_others_keeps_its_text(pair: Pair) -> None:
    """It has no position to spare for the token that stands in for it."""
    for place, length in ((None, 3), (PLACES[0], LENGTH), (PLACES[3], 5)):
        pair.begin(place, [7 + length] * length)
    for token in range(4):
        pair.decode([True, False, True], [token] * 3)
    full = pair.busy[1][1]
    assert len(full.tokens) == LENGTH and full.index == 1
    while pair.busy:
        pair.end(0, keep=False)


def test_a_row_that_has_no_numbers_harms_no_other(pair: Pair) -> None:
    """Its adapter may have broken it; what stands in for its token has none either."""
    for place in (PLACES[0], PLACES[2], None):
        pair.begin(place, [5, 6, 7])
    one, broken, other = (row for _, row, _ in pair.busy)
    pair.replayed.kv.data[:, :, broken.index, :, :3] = torch.nan
    works = [Work(one, PLACES[0], [9]), Work(other, None, [9])]
    assert broken.index == 1
    found = by_row(pair.replayed.run(works, []))
    works = [
        Work(row, work.place, [9]) for (row, _, _), work in zip(pair.busy[::2], works, strict=True)
    ]
    same(found, by_row(pair.computed.run(works, [])))
    while pair.busy:
        pair.end(0, keep=False)


def test_nothing_is_left_of_the_step_before(pair: Pair) -> None:
    """Bit for bit, a replay says what a fresh recording of that very step says."""
    graphs, kv = pair.graphs, pair.replayed.kv
    for place in PLACES:
        pair.refill(place, 1)
    for owner, length in ((PLACES[0], 9), (None, 4), (PLACES[2], 8), (PLACES[1], 3)):
        pair.begin(owner, [5, *range(9, 9 + length - 1)])
    rows = [row for _, row, _ in pair.busy]
    batches = [
        [Work(row, place, [11]) for row, place in zip(rows, PLACES, strict=True)],
        [Work(row, place, [12]) for row, place in zip(rows[1:], PLACES[2::-1], strict=True)],
        [Work(rows[3], PLACES[0], [13]), Work(rows[0], PLACES[2], [13])],
        [Work(rows[3], PLACES[1], [13]), Work(rows[2], PLACES[2], [13])],
    ]  # the last three are of one kind
    data = kv.data.clone()
    fresh = []
    for batch in batches:
        graphs.forget()
        fresh.append(graphs.run(batch, at_once=True))
        kv.data.copy_(data)
    graphs.forget()
    for batch in batches:
        graphs.run(batch, at_once=True)
        kv.data.copy_(data)
    assert len(graphs.recorded) == 2
    for batch, wanted in zip(batches[::-1], fresh[::-1], strict=True):
        found = graphs.run(batch, at_once=True)
        assert found is not None and wanted is not None and torch.equal(found, wanted)
        kv.data.copy_(data)
    while pair.busy:
        pair.end(0, keep=False)


def test_a_slot_that_is_refilled_is_read_anew(pair: Pair) -> None:
    """The same rows with the same slot, whose adapters change more layers or fewer."""
    pair.begin(PLACES[2], [5, 6, 7])
    for number in (1, 0, 2, 3):
        pair.refill(PLACES[2], number)
        pair.decode([True], [9])
    pair.end(0, keep=False)


def test_a_row_whose_token_is_not_asked_for_is_computed(pair: Pair) -> None:
    for place in (PLACES[1], None):
        pair.begin(place, [5, 6, 7])
    one, other = (busy[1] for busy in pair.busy)
    works = [Work(other, None, [8]), Work(one, PLACES[1], [8], last=False)]
    asked, logits = pair.replayed.run(works, [])
    assert asked == works[:1] and len(logits) == 1 and one.tokens == other.tokens == [5, 6, 7, 8]
    wanted, all_of = pair.computed.run([Work(busy[0], busy[2], [8]) for busy in pair.busy], [])
    same(logits[0], all_of[[work.place for work in wanted].index(None)])
    while pair.busy:
        pair.end(0, keep=False)


def test_a_kind_is_recorded_once_it_came_often_and_the_oldest_make_room() -> None:
    recorded: list[Step] = []

    def recorder(step: Step) -> Step:
        recorded.append(step)
        return again(step)

    with cpu_kernels():
        pair = Pair(small_base, recorder)
        recorded.clear()
        graphs, row = pair.graphs, pair.replayed.kv.take(Owner("", "t"), [3])
        graphs.patience, graphs.most = 3, 2
        batches = [[Work(row, place, [4])] for place in (None, PLACES[0], PLACES[2])]
        for batch in batches[:2]:
            assert [graphs.run(batch) is None for _ in range(5)] == [True] * 3 + [False] * 2
        assert len(recorded) == len(graphs.recorded) == 2
        graphs.run(batches[0])
        assert graphs.run(batches[2]) is None  # and the second has gone
        assert [kind.groups for kind in graphs.recorded] == [()]
        assert graphs.run(batches[0]) is not None and len(recorded) == 2
        assert graphs.run(batches[1]) is None
        pair.close()
        assert not graphs.recorded


def test_a_server_of_32_rows_and_4096_tokens_has_few_sizes() -> None:
    fine, least = FINE
    rows = {rounded(rows, fine) for rows in range(1, 33)}
    lengths = {rounded(max(least, length), least) for length in range(1, 4097)}
    assert rows == {1, 2, 4, 8, 12, 16, 24, 32}
    assert lengths == {256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096}
    assert all(n <= rounded(n, 8) < 2 * n for n in range(1, 3000))


@pytest.mark.parametrize("most", [1, decode_graphs._MOST])
def test_requests_are_answered_with_the_same_tokens(most: int) -> None:
    """Through the batcher: arrivals, prompts in parts, departures and adapters that share slots."""
    told: list[list[list[int]]] = []
    for kernels, recorder in ((False, None), (True, tape)):
        with (
            cpu_kernels(),
            ModelRunner(
                small_base(), rows=4, length=64, slots=2, kernels=kernels, recorder=recorder
            ) as runner,
        ):
            if runner.graphs:
                runner.graphs.patience, runner.graphs.most = 1, most
            desk, heard = Desk(runner, slots=2, prefill_tokens=8), []
            for number in range(9):
                prompt = [2 + number] * (1 + 3 * number)
                sampling = Sampling(5 + number, temperature=0, ignore_eos=True)
                heard.append(desk.ask(prompt, sampling, number % 5, f"{number % 2}")[1])
                for _ in range(number % 4):
                    desk.batcher.step()
            desk.finish()
            assert not runner.graphs or runner.graphs.recorded
        told.append([tokens_of(events) for events in heard])
    assert told[0] == told[1] and all(told[0])


# --- what is refused ------------------------------------------------------------------------------


def stale(step: Step) -> Step:
    """Says for ever what the first step said."""
    first = step().clone()
    return lambda: first


def forgets_slots(step: Step) -> Step:
    """Adds no adapter's work."""
    runs = step.__self__._parts  # type: ignore[attr-defined]
    runs.clear()
    return again(step)


def breaks(step: Step) -> Step:
    raise RuntimeError("operation not permitted when stream is capturing\nand a trace")


@pytest.mark.parametrize(
    ("recorder", "why"),
    [(stale, "other logits"), (forgets_slots, "other logits"),
     (breaks, "cannot be recorded: operation not permitted when stream is capturing \\(serve")],
)  # fmt: skip
def test_recordings_that_are_wrong_are_found_before_anybody_is_answered(
    recorder: Recorder, why: str
) -> None:
    base: Any = small_base()
    with cpu_kernels(), pytest.raises(ModelError, match=f"small: .*{why}") as told:
        ModelRunner(base, rows=4, length=32, slots=2, kernels=True, recorder=recorder)
    assert "\n" not in str(told.value) and "--cuda-graphs" in told.value.hint
    assert base.model.config._attn_implementation != "meadow_packed"


@pytest.mark.parametrize(("rows", "length", "slots"), [(1, 2, 1), (1, 3, 4), (3, 2, 1), (9, 16, 3)])
def test_the_check_passes_at_any_size_and_leaves_nothing(
    rows: int, length: int, slots: int
) -> None:
    seen = []

    def recorder(step: Step) -> Step:
        seen.append(step)
        return tape(step)

    size = {"rows": rows, "length": length, "slots": slots}
    with (
        cpu_kernels(),
        ModelRunner(small_base(), **size, kernels=True, recorder=recorder) as runner,
    ):
        assert seen and runner.graphs is not None and not runner.graphs.recorded
        assert not runner.slots.groups and runner.kv.free == rows
        assert all(row.owner is None for row in runner.kv.rows)


def test_a_tape_refuses_what_a_capture_does() -> None:
    numbers = torch.ones(2)
    for step in (
        lambda: numbers.add_(torch.tensor([1.0, 2.0])),
        lambda: numbers.mul_(float(numbers[0])),
    ):
        with pytest.raises(RuntimeError, match="while a step is recorded"):
            tape(step)


def test_without_a_gpu_or_triton_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the base is on cpu .serve without --cuda-graphs"):
        check_recording(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(cuda_recorder, "has_kernels", lambda device, dtype: False)
    with pytest.raises(
        ConfigError, match="need Triton.s kernels, and there are none for torch.float64"
    ):
        check_recording(torch.device("cuda"), torch.float64)
    base, options = small_base(), EngineOptions(cuda_graphs=True)
    with pytest.raises(ConfigError, match="need a CUDA device"):
        Engine(base, None, options)  # type: ignore[arg-type]
    assert not any("base" in name for name, _ in base.model.named_modules())


def test_a_server_refuses_before_it_loads_its_base() -> None:
    options = ServeOptions(
        base="no/such-base", device="cpu", engine=EngineOptions(cuda_graphs=True)
    )
    with pytest.raises(ConfigError, match="need a CUDA device"), opened_front(options, Tenants()):
        pass


# --- on a GPU -------------------------------------------------------------------------------------

GPU = torch.device("cuda")


@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernels(GPU, torch.float32)), reason="there is no GPU"
)
def test_captured_steps_are_as_computed_ones() -> None:
    def moved() -> Base:
        base = small_base()
        return replace(base, model=base.model.to(GPU), device=GPU)

    size: Any = {"rows": ROWS, "length": 64, "slots": SLOTS}
    with (
        ModelRunner(moved(), **size) as computed,
        ModelRunner(moved(), **size, recorder=CudaRecorder()) as replayed,
    ):
        assert replayed.graphs is not None
        replayed.graphs.patience = 0
        runners, found = (computed, replayed), []
        for runner in runners:
            for place in PLACES:
                runner.write(place, adapter(place, 0))
            rows = [runner.kv.take(Owner("", f"{at}"), [3] * 9) for at in range(ROWS)]
            places = [*PLACES, None, PLACES[0]]
            prompts = [
                Work(row, place, range(2, 4 + 3 * row.index))
                for row, place in zip(rows, places, strict=True)
            ]
            runner.run([], prompts)
            for step in range(12):
                batch = [
                    Work(row, place, [5 + step])
                    for row, place in zip(rows, places, strict=True)
                    if (row.index + step) % 3
                ]
                found.append(by_row(runner.run(batch, [])).cpu())
        assert replayed.graphs.recorded
    for one, other in zip(found[:12], found[12:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
