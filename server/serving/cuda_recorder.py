"""Recording of a step on a GPU, as a CUDA graph."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ...peft_adapters.serving_slots import has_kernels
from .decode_graphs import Step

_WITHOUT = "serve without --cuda-graphs"
_WARM = 2  # runs before a step is recorded: in the first, kernels are compiled and chosen


class CudaRecorder:
    """Records steps of one thread, which share a memory pool: they never run at once, and what a
    step leaves lies elsewhere."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        self._warm(step)
        graph = torch.cuda.CUDAGraph()
        # what other threads do on the device meanwhile is no part of it, and no fault
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _warm(self, step: Step) -> None:
        """On the stream that is recorded, as PyTorch asks for."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM):
                step()
        current.wait_stream(self._stream)


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
