"""One run per GPU: a trainer that loads its base there keeps this user's others away from it.

Two runs on one GPU would each find less memory than they measured before, in the middle of a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..errors import JournalError, ModelError
from ..store import Disk, locked


@contextmanager
def gpu_claimed(device: str, folder: Path) -> Iterator[None]:
    """Hold the GPU that [model] `device` ("auto", "cpu" or "cuda") means; no effect on a CPU.

    Locks are files in `folder`, one a GPU.  Raises ModelError where another process holds it.
    """
    gpu = _gpu(device)
    if gpu is None:
        yield
        return
    Disk().folder(folder)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / f"gpu-{gpu}.lock", ""))
        except JournalError as error:
            raise ModelError(
                "another run of this user trains on the GPU", "wait for it, or train on the CPU"
            ) from error
        yield


def _gpu(device: str) -> str | None:
    """The identifier of the GPU that would be used."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
