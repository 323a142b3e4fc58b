"""Which of torch's attention kernels a GPU takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_guard = threading.Lock()  # the choice is the process's: the last of its users gives it back
_users, _before = 0, True


@contextmanager
def any_length_at_once() -> Iterator[None]:
    """Attention by kernels that take any shape as it comes.

    On Hopper and Blackwell torch 2.11 and later take cuDNN's first, for masks too: it plans anew,
    for some tenths of a second, for each length that it has not seen.  Batches have many, and
    texts that are generated grow by a token a step.  Plans are kept without bound, and for each
    thread.
    """
    global _users, _before
    with _guard:
        if not _users:
            _before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        _users += 1
    try:
        yield
    finally:
        with _guard:
            _users -= 1
            if not _users:
                torch.backends.cuda.enable_cudnn_sdp(_before)
