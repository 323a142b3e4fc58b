"""Triton's kernels over the slots: under its interpreter, on a GPU, and compiled for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meadow.peft_adapters import serving_slots
from meadow.peft_adapters.serving_slots import Place, Segment, has_kernels
from meadow.simulation.slot_check import SLOTS, TOLERANCE, Case, exact, gap, served

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
HELPERS = Path(__file__).parents[1] / "helpers"

COMPILED = """
import re
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from meadow.peft_adapters import serving_triton as own
from meadow.peft_adapters.slot_tokens import LONG, SHORT

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
ARGUMENTS = {
    own._shrink: ("x", "a", "inner"), own._expand: ("y", "b", "inner"),
}

def compiled(kernel, dtype, **constants):
    first, second, inner = ARGUMENTS[kernel]
    signature = {first: POINTER[dtype], second: POINTER[dtype], inner: "*fp32"}
    signature |= {"order": "*i32", "blocks": "*i32", "total": "i32", first + "_row": "i32"}
    signature |= {second + "_slot": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

for dtype in POINTER:
    for rank, size in ((8, SHORT), (64, SHORT), (16, LONG), (256, LONG)):
        part, parts = own._parts(14336)
        common = dict(RANK=rank, M=size, R=own._ranks(rank), WIDEN=False)
        K = own._BYTES // dtype.itemsize
        one = compiled(own._shrink, dtype, COLUMNS=14336, PART=part, K=K, **common)
        two = compiled(own._expand, dtype, ROWS=14336, PARTS=parts, N=own._ROWS, **common)
        for kernel in (one, two):
            assert "cubin" in kernel.asm, kernel.asm.keys()
            assert not re.search(r"\\b(atom|red)\\.", kernel.asm["ptx"])
            assert kernel.metadata.shared <= 227 * 1024, kernel.metadata
            tensor_cores = "mma" in kernel.asm["ptx"]
            assert tensor_cores == (dtype == torch.bfloat16)
"""


def python(*arguments: str, **environment: str) -> str:
    """What a Python of its own prints."""
    path = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_under_the_interpreter_tokens_are_as_in_float64_and_as_products_have_them() -> None:
    found = python(str(HELPERS / "slot_kernels.py"), "cpu", "12", TRITON_INTERPRET="1")
    assert found == "12 agreed\n"


@needs_triton
@pytest.mark.long
def test_many_more_batches_under_the_interpreter() -> None:
    found = python(str(HELPERS / "slot_kernels.py"), "cpu", "400", TRITON_INTERPRET="1")
    assert found == "400 agreed\n"


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_tokens_are_as_in_float64_and_as_products_have_them() -> None:
    assert python(str(HELPERS / "slot_kernels.py"), "cuda", "60") == "60 agreed\n"


@needs_triton
@pytest.mark.long
def test_they_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    """For compute capability 9.0: bfloat16 on tensor cores, nothing atomic, shared memory fits."""
    python("-c", COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_kernels_compute_on_a_gpu_alone_and_in_no_more_than_32_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving_slots, "_work", lambda dtype: True)
    gpu = torch.device("cuda")
    assert has_kernels(gpu, torch.bfloat16) == has_kernels(gpu, torch.float32) == TRITON
    assert not has_kernels(torch.device("cpu"), torch.float32)
    assert not has_kernels(gpu, torch.float64)


def test_the_check_tells_one_adapter_from_another() -> None:
    """Else kernels could take any."""
    case = Case(48, 20, (Place(8, 1), None, Place(64, 0)), (Segment(Place(8, SLOTS - 1), 3),))
    found = served(case, "cpu").clone()
    assert gap(found, exact(case)) < TOLERANCE[torch.float32]
    for decode in ((Place(8, 2), *case.decode[1:]), (case.decode[0], None, Place(64, 1))):
        assert gap(found, exact(replace(case, decode=decode))) > 0.1
    found[3, 5] = torch.nan
    assert not gap(found, exact(case)) < TOLERANCE[torch.float32]
