"""What a machine with a GPU runs before its figures count: same bits, same losses, then speed.

`python -m meadow.simulation.gpu_check [DEVICE]` compares the device with this machine's CPU, in
float32 without TF32, and writes a report as JSON.  Losses agree up to rounding; signs, and what an
integer state exports, agree to the last bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..peft_adapters.base_model import device_of
from ..peft_adapters.philox import signs
from ..strategies.base import Probe
from .device_report import told
from .mezo import Mezo, borrowed
from .provenance import provenance
from .zo_setup import FULL, HEADER, RANK, Setup, Shape

TOLERANCE = 1e-4  # of a loss in float32
_COUNTS = (1, 127, 128, 4097, 1 << 20)
_SEEDS = (0, 1, 0x0123456789ABCDEF, 2**64 - 1)
_REPEATS = 20


def run(device: str, shape: Shape = FULL, rank: int = RANK) -> dict[str, Any]:
    """The report; `passed` says whether all that has to agree does."""
    device_of(device)  # says in one line that there is none
    with _full_precision():
        here, there = Setup(shape, rank), Setup(shape, rank, device)
        gap = float((_losses(here) - _losses(there)).abs().max())
        checks = {"signs": _same_signs(device), "pool": _same_pool(here, device)}
        milliseconds = _speed(there)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "bench": "gpu_check",
        **provenance(),
        "device": name,
        "shape": str(shape),
        "equal": checks,
        "loss_difference": gap,
        "passed": all(checks.values()) and gap < TOLERANCE,
        "milliseconds": milliseconds,
    }


def _same_signs(device: str) -> bool:
    return all(
        torch.equal(signs(seed, 3, part, count, device).cpu(), signs(seed, 3, part, count))
        for seed in _SEEDS
        for part in (0, 1, 2**32 - 1)
        for count in _COUNTS
    )


def _same_pool(setup: Setup, device: str) -> bool:
    """U and V of every matrix."""
    pool = setup.pool
    return all(
        torch.equal(side(index, device).cpu(), side(index))
        for side in (pool.left, pool.right)
        for index in range(len(pool.sites))
    )


def _losses(setup: Setup) -> Tensor:
    """At both signs of one direction for each row of the batch: (rows, 2)."""
    k = tuple(range(7, 7 + setup.shape.rows))
    request = Probe(setup.pool, setup.q, k, 2.0**HEADER.epsilon, 0)
    return setup.trainer.probe([setup.participant.job(request)])[0].losses


def _speed(setup: Setup) -> dict[str, float]:
    """Median wall time of a pass, of the device alone."""
    mezo = Mezo(setup.parameters, lr=1e-9, epsilon=1e-3)

    def adapted() -> None:
        with setup.adapted():
            setup.loss(copies=2)

    with borrowed(setup.parameters):
        return {
            "bare forward of 2B rows": _timed(setup, lambda: setup.loss(copies=2)),
            "forward of 2B rows with adapter": _timed(setup, adapted),
            "step": _timed(setup, setup.step),
            "MeZO's step": _timed(setup, lambda: mezo.step(1, setup.loss)),
            "rebuild": _timed(setup, setup.rebuild),
            "2^20 signs": _timed(setup, lambda: signs(1, 0, 0, 1 << 20, setup.ids.device)),
        }


def _timed(setup: Setup, act: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        _wait(setup)
        began = time.perf_counter()
        act()
        _wait(setup)
        times.append(time.perf_counter() - began)
    return round(1e3 * median(times[1:]), 3)


def _wait(setup: Setup) -> None:
    if setup.ids.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


if __name__ == "__main__":
    status, text = told(run, sys.argv[1:])
    (sys.stdout if status < 2 else sys.stderr).write(text + "\n")
    sys.exit(status)
