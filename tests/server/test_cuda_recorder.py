"""What recording asks of torch, and how it leaves it: where a step fails, and where no graph is
left.  In torch's place stands what its sources do; captures themselves need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from meadow.server.serving.cuda_recorder import CudaRecorder


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited_for.append(other)


class Graph:
    """`torch.cuda.CUDAGraph`: it holds its pool, whose handle is void once nothing does."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Cuda:
    """`torch.cuda`, as far as a recorder uses it."""

    def __init__(self) -> None:
        self.own, self.stream = Stream(), Stream()
        self.current: object = self.own
        self.handles = 0
        self.pools: list[Any] = []  # of each capture
        self.fails = ""  # where

    def graph_pool_handle(self) -> tuple[int, int]:
        self.handles += 1
        return 0, self.handles

    def set_stream(self, stream: object) -> None:
        self.current = stream

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Any, **options: Any) -> Iterator[None]:
        """As `torch.cuda.graph`: where a capture's end fails, its stream stays the current one."""
        assert options == {"capture_error_mode": "thread_local"}
        self.pools.append(pool)
        before, self.current = self.current, stream
        yield
        if self.fails == "end":
            raise RuntimeError("capture was invalidated")
        self.current = before

    def step(self) -> Tensor:
        if self.fails == "step":
            raise RuntimeError("out of memory")
        return torch.zeros(1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name, found in {
        "Stream": lambda: fake.stream, "CUDAGraph": Graph, "graph": fake.graph, "stream": fake.on,
        "set_stream": fake.set_stream, "current_stream": lambda: fake.current,
        "graph_pool_handle": fake.graph_pool_handle,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, found)
    return fake


@pytest.mark.parametrize("fails", ["", "step", "end"])
def test_the_thread_has_its_own_stream_again_which_waits_for_what_was_begun(
    cuda: Cuda, fails: str
) -> None:
    """Steps that are computed from then on would else race with it."""
    recorder = CudaRecorder()
    cuda.fails = fails
    if fails:
        with pytest.raises(RuntimeError):
            recorder(cuda.step)
    else:
        recorder(cuda.step)
    assert cuda.current is cuda.own and cuda.own.waited_for == [cuda.stream]
    assert cuda.stream.waited_for == [cuda.own]


def test_graphs_share_a_pool_for_as_long_as_one_holds_it(cuda: Cuda) -> None:
    """After that its handle is void: torch asserts that somebody holds what is shared."""
    recorder = CudaRecorder()
    one = recorder(cuda.step)
    other = recorder(cuda.step)
    assert len(set(cuda.pools)) == 1
    del one
    one = recorder(cuda.step)
    assert len(set(cuda.pools)) == 1
    del one, other
    recorder(cuda.step)
    assert len(set(cuda.pools)) == 2
