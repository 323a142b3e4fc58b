"""Recording of a step on a GPU, as a CUDA graph."""

from __future__ import annotations

from weakref import WeakSet

import torch

from ...errors import ConfigError
from ...peft_adapters.serving_slots import has_kernels
from .decode_graphs import Step

_WITHOUT = "serve without --cuda-graphs"
_WARM = 2  # runs before a step is recorded: in the first, kernels are compiled and chosen


class CudaRecorder:
    """Records steps of one thread, which share a memory pool: they never run at once, and what a
    step leaves lies elsewhere.

    Once a recording has failed no other may be tried: a capture that is not ended as it should be
    leaves torch's allocator in it (`CUDAGraph::capture_end`).
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, step: Step) -> Step:
        """Raises what `step` raises, and RuntimeError where it cannot be recorded."""
        current = torch.cuda.current_stream()
        try:
            self._warm(step, current)
            return self._recorded(step)
        finally:
            # whose end fails, leaves its own stream as the current one; and what a step that failed
            # has begun there uses memory that is now free for others
            torch.cuda.set_stream(current)
            current.wait_stream(self._stream)

    def _warm(self, step: Step, current: torch.cuda.Stream) -> None:
        """On the stream that is recorded, as PyTorch asks for."""
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM):
                step()

    def _recorded(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # which hold the pool: without any its handle is void
            self._pool = torch.cuda.graph_pool_handle()
        # what other threads do on the device meanwhile is no part of it, and no fault
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = step()
        self._graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def check_recording(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError where no step can be recorded."""
    if device.type != "cuda":
        raise ConfigError(
            f"CUDA graphs need a CUDA device, and the base is on {device.type}", _WITHOUT
        )
    if not has_kernels(device, dtype):
        raise ConfigError(
            f"CUDA graphs need Triton's kernels, and there are none for {dtype} here", _WITHOUT
        )
