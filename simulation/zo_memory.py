"""Peak memory of one forward pass or one step, measured in a process that does nothing else.

`python -m meadow.simulation.zo_memory KIND SHAPE` writes by how many bytes the process's peak
resident memory exceeds what was resident after its imports: weights and what the pass allocates.
The C library is told to give large blocks back at once, so that the peak is that of live tensors,
not of the allocator's habits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import MeadowError
from .mezo import Mezo
from .zo_setup import Setup, Shape

_STATUS = Path("/proc/self/status")
_REPEATS = 2  # the second finds what the first one left


def forward(setup: Setup) -> None:
    """Both signs' rows with the state in place."""
    with setup.adapted():
        setup.loss(copies=2)


def step(setup: Setup) -> None:
    """meadow's zeroth-order step."""
    setup.step()


def mezo(setup: Setup) -> None:
    """MeZO's own step on the same batch."""
    Mezo(setup.parameters, lr=1e-7, epsilon=1e-3).step(0, setup.loss)


KINDS: dict[str, Callable[[Setup], None]] = {"forward": forward, "step": step, "mezo": mezo}


def growth(kind: str, shape: Shape, rank: int) -> int:
    """Bytes by which this process grows at its peak; to be asked for once in a process."""
    before = _status("VmRSS")
    setup = Setup(shape, rank)
    for _ in range(_REPEATS):
        KINDS[kind](setup)
    return _status("VmHWM") - before


def growth_apart(kind: str, shape: Shape, rank: int) -> int:
    """The same, in a fresh process."""
    told = json.dumps({"rank": rank, **dataclasses.asdict(shape)})
    command = [sys.executable, "-P", "-m", "meadow.simulation.zo_memory", kind, told]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise MeadowError(f"the process that measures memory failed: {last}")
    return int(json.loads(done.stdout)["bytes"])


def _status(key: str) -> int:
    """An entry of the kernel's account of this process, in bytes.

    Not getrusage: its peak is that of the parent where that was larger when it started this one.
    Raises MeadowError where there is no such account.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise MeadowError(f"peak memory is measured on Linux alone: {error}") from error
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401  (imports are not what is measured)

    torch.set_num_threads(1)
    fields = json.loads(sys.argv[2])
    found = growth(sys.argv[1], rank=fields.pop("rank"), shape=Shape(**fields))
    sys.stdout.write(json.dumps({"bytes": found}) + "\n")
