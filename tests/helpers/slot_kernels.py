"""The kernels over a layer's slots, in a process of their own: `python slot_kernels.py DEVICE`.

Triton decides when its kernels are defined whether its interpreter runs them (TRITON_INTERPRET=1).
Prints how many cases agreed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served_models import packed_adapter, small_base
from torch import Tensor

from meadow.peft_adapters.base_model import Base
from meadow.peft_adapters.serving_slots import Packed, Place, Segment, kernel_is_right
from meadow.peft_adapters.serving_triton import add
from meadow.peft_adapters.slot_tokens import SHORT, Tokens, listed
from meadow.server.serving.cuda_recorder import CudaRecorder
from meadow.server.serving.decode_graphs import Recorder, Step
from meadow.server.serving.kv_rows import Owner
from meadow.server.serving.model_runner import ModelRunner, Work
from meadow.simulation.slot_check import SLOTS, TOLERANCE, Case, exact, gap, served

RANKS = st.sampled_from([8, 16, 64, 128])
PLACES = st.one_of(st.none(), st.builds(Place, RANKS, st.integers(0, SLOTS - 1)))
LENGTHS = st.one_of(st.integers(1, 5), st.integers(15, 17), st.integers(63, 66))  # near a block's
PROMPTS = st.builds(Segment, PLACES, LENGTHS)
CASES = st.builds(
    Case,
    columns=st.one_of(st.integers(1, 70), st.integers(500, 1300)),  # below and above a part's
    rows=st.integers(1, 300),
    decode=st.lists(PLACES, max_size=24).map(tuple),
    segments=st.lists(PROMPTS, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
).filter(lambda case: bool(case.places))


def main(device: str, examples: int) -> None:
    agreed = 0

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=CASES)
    def compare(case: Case) -> None:
        """With float64, with batched products, and with the same once more."""
        nonlocal agreed
        found, bound = served(case, device, kernels=True), TOLERANCE[case.dtype]
        assert gap(found, exact(case)) < bound
        assert gap(found, served(case, device, kernels=False)) < 2 * bound
        assert torch.equal(found, served(case, device, kernels=True))
        agreed += 1

    for dtype in TOLERANCE:
        assert kernel_is_right(torch.device(device), dtype)
    compare()
    compare_a_model(device)
    compare_recorded(device)
    for rank in (8, 64):
        leave_empty_blocks_alone(device, rank)
    sys.stdout.write(f"{agreed} agreed\n")


def compare_a_model(device: str) -> None:
    """Prompts and decoding rows of mixed ranks and of the base, and a slot that is refilled."""
    own, products = (logits_of(device, kernels) for kernels in (True, False))
    for found, wanted in zip(own, products, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def logits_of(device: str, kernels: bool) -> list[Tensor]:
    """Of each step, in the order of the rows."""
    found = []
    with ModelRunner(base_on(device), rows=5, length=32, slots=2, kernels=kernels) as runner:
        places = fill(runner, (1, 2, 3, 4))
        rows = [runner.kv.take(Owner(str(at), "t"), range(40)) for at in range(5)]
        chosen = [places[0], places[1], None, places[3], places[0]]
        prompts = [
            Work(row, at, range(3, 9 + row.index)) for row, at in zip(rows, chosen, strict=True)
        ]
        found.append(by_row(runner.run([], prompts)))
        for token in (5, 6):
            decode = [Work(row, at, [token]) for row, at in zip(rows[:4], chosen[:4], strict=True)]
            segment = Work(rows[4], places[0], range(10, 13))
            found.append(by_row(runner.run(decode, [segment])))
            runner.write(places[1], refill(runner, places[1]))
    return found


def base_on(device: str) -> Base:
    base = small_base()
    return replace(base, model=base.model.to(device), device=torch.device(device))


def compare_recorded(device: str) -> None:
    """Decoding steps that are recorded and replayed, with gaps, a slot that is refilled, and
    without adapters."""

    def itself(step: Step) -> Step:
        return step

    recorder: Recorder = itself if device == "cpu" else CudaRecorder()
    computed, replayed = decoded(device, None), decoded(device, recorder)
    for found, wanted in zip(replayed, computed, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def decoded(device: str, recorder: Recorder | None) -> list[Tensor]:
    """Of each step, in the order of the rows."""
    found = []
    with ModelRunner(
        base_on(device), rows=3, length=16, slots=2, kernels=True, recorder=recorder
    ) as runner:
        places = fill(runner, (1, 2, 4))
        rows = [runner.kv.take(Owner(str(at), "t"), range(40)) for at in range(3)]
        runner.run([], [Work(row, None, range(3, 9 + row.index)) for row in rows])
        if runner.graphs:
            runner.graphs.patience = 0
        turn = [*places, None]
        for token in range(4):
            chosen = [rows[at] for at in (2, 0, 1)[: 3 - token % 2]]
            batch = [Work(row, turn[(row.index + token) % 4], [token]) for row in chosen]
            found.append(by_row(runner.run(batch, [])))
            runner.write(places[1], refill(runner, places[1]))
        found.append(by_row(runner.run([Work(row, None, [7]) for row in rows], [])))
        assert recorder is None or runner.graphs is not None and runner.graphs.recorded
    return found


def leave_empty_blocks_alone(device: str, rank: int) -> None:
    """Blocks without tokens, and places in the order that no block has, change not a bit.

    What they would read is NaN: the slot that they name, and the token.
    """
    random = torch.Generator().manual_seed(rank)
    x, y, a, b = (
        torch.randn(shape, generator=random).to(device)
        for shape in ((6, 700), (6, 130), (3, rank, 700), (3, rank, 130))
    )
    a[0], b[0], x[0] = torch.nan, torch.nan, torch.nan
    own = listed({1: [4, 2], 2: [5]}, SHORT).on(x.device)
    order, blocks = torch.zeros(6).to(own.order), torch.zeros(6, 3).to(own.blocks)
    order[:3], blocks[:2] = own.order, own.blocks
    wanted, found = y.clone(), y.clone()
    add(x, wanted, a, b, own)
    add(x, found, a, b, Tokens(order, blocks, SHORT))
    assert torch.equal(found, wanted) and not torch.equal(found, y) and found.isfinite().all()
    add(x, found, a, b, Tokens(order, torch.zeros_like(blocks), SHORT))
    assert torch.equal(found, wanted)


def fill(runner: ModelRunner, numbers: Sequence[int]) -> list[Place]:
    """Adapters 1 (rank 64), 2 (padded to 8), 3 (16) and 4 (8) in slots of their ranks."""
    places: list[Place] = []
    for number in numbers:
        packed = packed_adapter(number, tuple(runner.slots.sites))
        places.append(Place(packed.rank, sum(place.rank == packed.rank for place in places)))
        runner.write(places[-1], packed)
    return places


def refill(runner: ModelRunner, place: Place) -> Packed:
    """Another adapter of that slot's rank."""
    other = packed_adapter(6, tuple(runner.slots.sites))
    assert other.rank == place.rank
    return other


def by_row(answer: tuple[list[Work], Tensor]) -> Tensor:
    works, logits = answer
    order = sorted(range(len(works)), key=lambda at: works[at].row.index)
    return logits[order].cpu()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
