"""What many adapters cost a server on a GPU: correct sums first, then a step's time.

`meadow bench serve-gpu` and `python -m meadow.simulation.serve_gpu [DEVICE]` check Triton's kernels
against float64 and against the batched products that they stand in for, on random batches, and then
time steps of a llama of random numbers, 8B in shape, with adapters and without.  The one writes a
table, the other a report as JSON.  DEVICE `cpu` is a rehearsal: a tiny llama, and no kernels.

A step is timed as the server computes it, and as replayed from a CUDA graph, which leaves out what
the host takes to launch it.  For decoding, `server_ms` is what a server with `--cuda-graphs` takes:
it fills in the batch, replays, and picks the logits, and reads as many positions as their number is
rounded up to.  `limit` is the best share of the base's throughput that memory allows a decoding
step: the base's bytes over those and the adapters', each read once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..peft_adapters.base_model import Base
from ..peft_adapters.serving_slots import Packed, Place, Segment, has_kernels
from ..server.serving.cuda_recorder import CudaRecorder
from ..server.serving.decode_graphs import Recorder
from ..server.serving.kv_rows import Row
from ..server.serving.model_runner import ModelRunner, Work
from ..server.serving.packed_attention import PackedStep, Prompt
from .device_report import told
from .provenance import provenance
from .random_llama import B8, TINY, Size, random_base
from .slot_check import SLOTS, TOLERANCE, Case, exact, gap, served

DECODE, PREFILL = "decode", "prefill"
_LOGITS = 5e-2  # of a whole model's logits in bfloat16, relative to their norm
_COPY = 2**30  # bytes
_ROOM = 1.25  # of what is held, for what steps take and graphs keep
CPU, CUDA = "cpu", "cuda"

Act = Callable[[], Tensor]


@dataclass(frozen=True)
class Load:
    """A decoding step has `rows` rows of `past` tokens; one of prefill `prompt` tokens in all."""

    size: Size = B8
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    adapters: tuple[int, ...] = (1, 8, 32)
    rows: int = 32
    past: int = 128
    prompt: int = 512
    repeats: int = 20

    @property
    def bytes(self) -> int:
        """About what it takes: the model, keys and values, and adapters in slots and as copies."""
        size, layers = self.size, self.size.layers
        shared = size.hidden // size.heads * (size.shared or size.heads)
        weights = layers * size.hidden * (2 * size.hidden + 2 * shared + 3 * size.inner)
        weights += size.vocabulary * size.hidden * (1 if size.tied else 2)
        past = (self.rows + 1) * (self.past + self.prompt) * layers * 2 * shared
        adapter = self.rank * layers * (9 * size.hidden + 2 * shared + 3 * size.inner)
        return self.dtype.itemsize * (weights + past + 2 * max(self.adapters) * adapter)


REHEARSAL = Load(TINY, torch.float32, 8, (1, 3), rows=4, past=5, prompt=12, repeats=1)


def check_machine(device: str, load: Load) -> None:
    """Raise ConfigError, before anything takes long, where there is no such device,
    nothing to be measured on it, or too little memory."""
    if device not in (CPU, CUDA):
        raise ConfigError(f"{device!r} is no device to measure", f"take {CUDA} or {CPU}")
    if device == CPU:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "no usable GPU found", "`python -m meadow.simulation.serve_gpu cpu` only rehearses"
        )
    if not has_kernels(torch.device(device), load.dtype):
        raise ConfigError(
            "Triton's kernels cannot be used here: there is nothing to measure",
            "install triton, a C compiler and Python's headers",
        )
    free, wanted = torch.cuda.mem_get_info()[0], _ROOM * load.bytes
    if free < wanted:
        raise ConfigError(
            f"the GPU has {free / 1e9:.0f} GB free, and {wanted / 1e9:.0f} are needed",
            "end what else uses it",
        )


def run(device: str, load: Load | None = None) -> dict[str, Any]:
    """The report; `passed` says whether all that has to agree does.

    Where kernels are wrong nothing is timed.  Raises as `check_machine`.
    """
    load = load or (Load() if device == CUDA else REHEARSAL)
    check_machine(device, load)
    gaps = check(device)
    right = all(one["passed"] for one in gaps)
    rows, apart = _timed_steps(device, load) if right else ([], torch.inf)
    return {
        "bench": "serve_gpu",
        **provenance(),
        "device": torch.cuda.get_device_name() if _on_gpu(device) else device,
        "load": str(load),
        "gaps": gaps,
        "logits_gap": apart,
        "passed": right and apart < _LOGITS,
        "copy_gb_per_second": round(_bandwidth(device) / 1e9, 1),
        "rows": rows,
    }


def _timed_steps(device: str, load: Load) -> tuple[list[dict[str, Any]], float]:
    """Rows of figures, and how far the logits of all ways to compute a step are apart."""
    base = random_base(load.size, dtype=load.dtype, device=device)
    rows: list[dict[str, Any]] = []
    logits = []
    for kernels in sorted({has_kernels(base.device, load.dtype), False}, reverse=True):
        with Steps(base, load, kernels, CudaRecorder() if kernels else None) as steps:
            rows += steps.rows()
            logits += [steps.logits(), *steps.replayed_logits()]
    return rows, float(torch.tensor([gap(found, logits[-1]) for found in logits]).max())


def check(device: str) -> list[dict[str, Any]]:
    """How far served tokens are from float64's, and from those of batched products."""
    return [_checked(case, device) for case in _cases()]


def _checked(case: Case, device: str) -> dict[str, Any]:
    ours, bound = served(case, device), TOLERANCE[case.dtype]
    from_exact, apart = gap(ours, exact(case)), gap(ours, served(case, device, False))
    again = torch.equal(ours, served(case, device))
    return {
        "dtype": str(case.dtype),
        "shape": (case.columns, case.rows, len(case.places)),
        "from_float64": from_exact,
        "from_products": apart,
        "same_again": again,
        "passed": from_exact < bound and apart < 2 * bound and again,
    }


def _cases() -> Iterator[Case]:
    """Rows that decode, prompts, and both, of several ranks, in layers of odd and real shapes."""
    shapes, types = ((96, 40), (1000, 333), (4096, 1024)), (torch.float32, torch.bfloat16)
    for seed, (rank, (columns, rows), dtype) in enumerate(product((8, 16, 64), shapes, types)):
        other = Place(8 if rank > 8 else 128, 1)
        places = [Place(rank, slot) for slot in range(SLOTS - 1)]
        decode = (None, *places[::-1], other, places[0], places[2])
        prompts = (Segment(places[0], 70), Segment(None, 5), Segment(other, 17))
        yield Case(columns, rows, decode, (), dtype, seed)
        yield Case(columns, rows, (), prompts, dtype, seed)
        yield Case(columns, rows, decode, prompts, dtype, seed)


class Steps(ModelRunner):
    """Steps of a base whose slots and past are filled with random numbers."""

    def __init__(
        self, base: Base, load: Load, kernels: bool, recorder: Recorder | None = None
    ) -> None:
        count, length = max(load.adapters), load.past + load.prompt
        super().__init__(
            base, rows=load.rows, length=length, slots=count, kernels=kernels, recorder=recorder
        )
        self.load, self._random = load, torch.Generator(base.device).manual_seed(0)
        with torch.inference_mode():
            self.kv.data.normal_(generator=self._random)
            for slot in range(count):
                self.write(Place(load.rank, slot), self._drawn())

    def rows(self) -> list[dict[str, Any]]:
        """Medians in milliseconds; base and adapters are timed one after the other."""
        return [self._row(kind, n) for kind in (DECODE, PREFILL) for n in self.load.adapters]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of a decoding step by the most adapters, in the rows' order."""
        act, order = self._decode(max(self.load.adapters))
        found = act()
        return found[torch.tensor(order).argsort().to(found.device)].double().cpu()

    @torch.inference_mode()
    def replayed_logits(self) -> list[Tensor]:
        """The same as the server replays them, if it does."""
        if self.graphs is None:
            return []
        found = self.graphs.run(self._works(max(self.load.adapters)), at_once=True)
        assert found is not None
        return [found.double().cpu()]

    @torch.inference_mode()
    def _row(self, kind: str, adapters: int) -> dict[str, Any]:
        bare, graphed_bare = self._timed(self._act(kind, adapters, bare=True))
        ours, graphed = self._timed(self._act(kind, adapters))
        row = {
            "path": "kernels" if self.slots.kernels else "products",
            "step": kind,
            "adapters": adapters,
            "base_ms": bare,
            "ms": ours,
            "share": round(bare / ours, 4),
        }
        if graphed and graphed_bare:
            share = round(graphed_bare / graphed, 4)
            row |= {"base_graph_ms": graphed_bare, "graph_ms": graphed, "graph_share": share}
        if self.graphs and kind == DECODE:
            bare, ours = self._server_ms(adapters, bare=True), self._server_ms(adapters)
            share = round(bare / ours, 4)
            row |= {"base_server_ms": bare, "server_ms": ours, "server_share": share}
        return row | ({"limit": round(self._limit(adapters), 4)} if kind == DECODE else {})

    def _act(self, kind: str, adapters: int, bare: bool = False) -> Act:
        if kind == DECODE:
            return self._decode(adapters, bare)[0]
        return self._prefill(adapters, bare)

    def _decode(self, adapters: int, bare: bool = False) -> tuple[Act, Sequence[int]]:
        """A step of all rows, whose adapters take turns, and the order of its rows."""
        rows = range(self.load.rows)
        places = [None if bare else Place(self.load.rank, row % adapters) for row in rows]
        order = self.slots.compose(places, []).decode
        step = PackedStep(self.kv, [(row, self.load.past) for row in order], [])
        return self._ready(step, self._tokens(self.load.rows)[list(order)], [*rows]), order

    def _works(self, adapters: int, bare: bool = False) -> list[Work]:
        """The same step as requests make it."""
        past, tokens = [0] * self.load.past, self._tokens(self.load.rows).tolist()
        return [
            Work(
                Row(at, tokens=past), None if bare else Place(self.load.rank, at % adapters), [new]
            )
            for at, new in enumerate(tokens)
        ]

    def _server_ms(self, adapters: int, bare: bool = False) -> float:
        graphs, works = self.graphs, self._works(adapters, bare)
        assert graphs is not None
        return _milliseconds(lambda: graphs.run(works, at_once=True), self.load.repeats)

    def _prefill(self, adapters: int, bare: bool = False) -> Act:
        """A step of one new prompt by each adapter."""
        length = self.load.prompt // adapters
        places = [None if bare else Place(self.load.rank, slot) for slot in range(adapters)]
        order = self.slots.compose([], [Segment(place, length) for place in places]).segments
        step = PackedStep(self.kv, [], [Prompt(row, 0, length) for row in order])
        keep = [length * (at + 1) - 1 for at in range(adapters)]
        return self._ready(step, self._tokens(length * adapters), keep)

    def _tokens(self, count: int) -> Tensor:
        random = torch.Generator().manual_seed(0)
        return torch.randint(5, self.load.size.vocabulary, (count,), generator=random)

    def _ready(self, step: PackedStep, tokens: Tensor, keep: list[int]) -> Act:
        """All that the model is given is on the device: nothing of a step but its own work."""
        device = self.base.device
        ids, positions = tokens.to(device), torch.tensor(step.positions, device=device)
        kept = torch.tensor(keep, device=device)
        return lambda: self._logits(ids, positions, step, kept)

    def _timed(self, act: Act) -> tuple[float, float | None]:
        """Milliseconds of a step, and of its replay on a GPU."""
        plain = _milliseconds(act, self.load.repeats)
        if not _on_gpu(self.base.device):
            return plain, None
        return plain, _milliseconds(CudaRecorder()(act), self.load.repeats)

    def _limit(self, adapters: int) -> float:
        model: Any = self.base.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        own = sum(parameter.nbytes for parameter in model.parameters())
        if head.weight is not embedding.weight:  # of which a step reads a few rows
            own -= embedding.weight.nbytes
        slots = self.slots.group(self.load.rank).slots
        return float(own / (own + adapters * (slots.a[0].nbytes + slots.b[0].nbytes)))

    def _drawn(self) -> Packed:
        """An adapter of small random numbers, at all layers."""
        slots = self.slots.group(self.load.rank).slots
        a, b = (
            torch.empty_like(side[0]).normal_(std=0.02, generator=self._random)
            for side in (slots.a, slots.b)
        )
        return Packed(self.load.rank, a, b, frozenset(site.name for site in self.slots.sites))


def _milliseconds(act: Callable[[], object], repeats: int) -> float:
    """Median wall time, of the device alone."""
    times = []
    for _ in range(3 + repeats):
        _wait()
        began = time.perf_counter()
        act()
        _wait()
        times.append(time.perf_counter() - began)
    return round(1e3 * median(times[3:]), 4)


def _bandwidth(device: str) -> float:
    """Bytes read and written by a copy, in a second."""
    size = _COPY if _on_gpu(device) else 2**20
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / _milliseconds(lambda: target.copy_(source), 10)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


if __name__ == "__main__":
    status, text = told(run, sys.argv[1:])
    (sys.stdout if status < 2 else sys.stderr).write(text + "\n")
    sys.exit(status)
