"""The Triton kernel under Triton's interpreter: the same bits as torch, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARED = """
import torch
from meadow.peft_adapters import philox, philox_triton

streams = [(0, 0, 0), (1, 0, 0), (0x0123456789ABCDEF, 7, 0), (2**64 - 1, 2**31, 2**32 - 1)]
for seed, tensor_id, part in streams:
    for count in (1, 127, 128, 5000):
        kernel = philox_triton.signs(seed, tensor_id, part, count, "cpu")
        assert kernel.dtype == torch.int8
        assert torch.equal(kernel, philox.signs(seed, tensor_id, part, count)), (seed, part, count)
assert philox_triton.signs(1, 0, 0, 0, "cpu").shape == (0,)
first = "".join("+-"[s < 0] for s in philox_triton.signs(1, 0, 0, 4096, "cpu")[:16].tolist())
assert philox.kernel_is_right("cpu")
assert first == "++++---++--+++++", first
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_kernel_gives_the_same_bits_as_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPARED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
