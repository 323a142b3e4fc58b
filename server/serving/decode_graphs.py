"""Decoding steps that are recorded once and replayed, so that the host has next to nothing to do.

A step of an 8B model is some thousand kernels, and launching them can take the host longer than a
GPU takes to run them.  A recorded step is launched as one, on the addresses that it was recorded
with.  So all that differs between two steps lies in one tensor that is filled before each: every
row's token and position, where its key goes, and which slots the rows use.  Masks and addresses
follow from these on the device.

Token i is row i's, so nothing has to be looked up: where rows lie close together, as `KVRows` keeps
them, few of the tokens are stand-ins.  Rows and positions are rounded up to few numbers, as every
other one is recorded by itself.  What is computed beyond the batch touches no row: see `FixedStep`.

Only `Recorder` knows how a step is recorded (`cuda_recorder`); all of this runs on a CPU too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...peft_adapters.serving_slots import Part, Place, ServingSlots, Use
from ...peft_adapters.slot_tokens import SHORT, Tokens
from .fixed_step import FixedStep
from .kv_rows import KVRows
from .work import Work

_LOG = logging.getLogger(__name__)

Step = Callable[[], Tensor]
Forward = Callable[[Tensor, Tensor, FixedStep], Tensor]
"""Logits (tokens, vocabulary) of token ids and positions, both (tokens)."""

_MOST = 32  # steps that are kept
_PATIENCE = 8  # steps of a kind before it is recorded: about what recording costs
_ROWS, _POSITIONS = 8, 256  # from which on sizes lie closer together; the fewest positions
_TOKEN, _POSITION, _ROW = range(3)  # lines of what a recorded step reads
_LINES = 4  # of a group: its order, and three of blocks


class Recorder(Protocol):
    """How a step is recorded."""

    def __call__(self, step: Step) -> Step:
        """What does again all that `step` does on the device, to the same tensors.

        `step` runs at least once, does the same however often it runs, and leaves its result in a
        tensor that was there before.
        """


class Kind(NamedTuple):
    """What steps have in common that one recording serves."""

    rows: int
    longest: int  # positions that are read
    groups: tuple[tuple[int, frozenset[str]], ...]  # rank, and layers that are adapted


@dataclass
class _Seen:
    """A kind of step: how often it came, and its recording once that was often enough."""

    times: int = 0
    recorded: _Recorded | None = None


class DecodeGraphs:
    """The recorded steps of a model; used by one thread.

    At most `most` are kept, those that were used last.  A kind of step is recorded once it came
    `patience` times: before that `run` declines it, so that kinds which do not come back cost
    nothing, and none costs much more than it would without recordings.

    Where a kind cannot be recorded, `failed` is set and no other is tried: those that are recorded
    go on, and `run` declines the rest.
    """

    def __init__(
        self,
        kv: KVRows,
        slots: ServingSlots,
        forward: Forward,
        recorder: Recorder,
        vocabulary: int,
        *,
        most: int = _MOST,
        patience: int = _PATIENCE,
    ) -> None:
        """`kv` has a scratch row, and `slots` compute by kernels."""
        self.kv, self.slots, self.forward, self.recorder = kv, slots, forward, recorder
        self.most, self.patience = most, patience
        rows = len(kv.rows)
        self.logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=kv.data.device)
        self.replayed, self.failed = 0, False  # steps, and whether one could not be recorded
        self._seen: OrderedDict[Kind, _Seen] = OrderedDict()

    @property
    def recorded(self) -> list[Kind]:
        """The one that was used last comes last."""
        return [kind for kind, seen in self._seen.items() if seen.recorded is not None]

    @torch.inference_mode()
    def run(self, batch: Sequence[Work], *, at_once: bool = False) -> Tensor | None:
        """The logits (works, vocabulary), float32, of rows that decode: of one token each.

        None, and no token is lost, where this kind of step has not come often enough to be
        recorded, or could not be; `at_once` it has come often enough, and what keeps it from being
        recorded is raised.
        """
        uses = self._uses(batch)
        kind = self._kind(batch, uses)
        seen = self._came(kind)
        if seen.recorded is None:
            if not at_once and (self.failed or seen.times <= self.patience):
                return None
            try:
                seen.recorded = _Recorded(kind, self, batch, uses)
            except (
                Exception
            ) as error:  # the step can still be computed, or says itself what is amiss
                if at_once:
                    raise
                self._give_up(error)
                return None
        self.replayed += 1
        found = seen.recorded.run(batch, uses)
        return found[[work.row.index for work in batch]]

    def _came(self, kind: Kind) -> _Seen:
        seen = self._seen.setdefault(kind, _Seen())
        self._seen.move_to_end(kind)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)
        seen.times += 1
        return seen

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        reason = str(error).partition("\n")[0] or type(error).__name__
        _LOG.warning(
            "a decoding step could not be recorded, and no other will be: %s",
            reason,
            exc_info=error,
        )

    def forget(self) -> None:
        """Drop all that is recorded."""
        self._seen.clear()

    def _uses(self, batch: Sequence[Work]) -> list[Use]:
        places: list[Place | None] = [None] * len(self.kv.rows)
        for work in batch:
            places[work.row.index] = work.place
        return self.slots.uses(places)

    def _kind(self, batch: Sequence[Work], uses: Sequence[Use]) -> Kind:
        span = max(work.row.index for work in batch) + 1
        longest = max(len(work.row.tokens) for work in batch) + 1
        return Kind(
            min(rounded(span, _ROWS), len(self.kv.rows)),
            min(rounded(max(longest, _POSITIONS), _POSITIONS), self.kv.length),
            tuple((use.rank, use.modules) for use in uses),
        )


class _Recorded:
    """A step of one kind, recorded with its first batch."""

    def __init__(
        self, kind: Kind, graphs: DecodeGraphs, batch: Sequence[Work], uses: Sequence[Use]
    ) -> None:
        """Raises what the recorder does."""
        self._kind, self._graphs = kind, graphs
        self._width = -(-kind.rows // 4) * 4  # whole 16 bytes, as kernels like their addresses
        size = (3 + _LINES * len(kind.groups)) * self._width
        self._inputs = torch.zeros(size, dtype=torch.int32, device=graphs.kv.data.device)
        self._lines = self._inputs.view(-1, self._width)
        self._parts = list(self._grouped())
        self._fill(batch, uses)
        self._replay = graphs.recorder(self._step)

    def run(self, batch: Sequence[Work], uses: Sequence[Use]) -> Tensor:
        """The logits of all rows, (rows, vocabulary), until the next step."""
        self._fill(batch, uses)
        return self._replay()

    def _fill(self, batch: Sequence[Work], uses: Sequence[Use]) -> None:
        numbers = list(chain.from_iterable(self._numbers(batch, uses)))
        self._inputs.copy_(torch.tensor(numbers, dtype=torch.int32))

    def _step(self) -> Tensor:
        """All of it, from the inputs to the logits; nothing here may differ from step to step."""
        graphs, rows = self._graphs, self._kind.rows
        graphs.slots.install(self._parts, rows)
        inputs = self._lines[:3, :rows].long()
        step = FixedStep(graphs.kv, inputs[_POSITION], inputs[_ROW], self._kind.longest)
        logits = graphs.forward(inputs[_TOKEN], inputs[_POSITION], step)
        return graphs.logits[:rows].copy_(logits)

    def _grouped(self) -> Iterator[Part]:
        """The work of each group, for as many blocks as there are rows."""
        rows = self._kind.rows
        for at, (rank, modules) in enumerate(self._kind.groups):
            first = 3 + _LINES * at
            order = self._lines[first, :rows]
            blocks = self._lines[first + 1 : first + _LINES].flatten()[: 3 * rows].view(rows, 3)
            yield self._graphs.slots.part(rank, modules, Tokens(order, blocks, SHORT))

    def _numbers(self, batch: Sequence[Work], uses: Sequence[Use]) -> Iterator[list[int]]:
        """What the step reads, line by line; it overwrites all that the step before has read."""
        width, scratch = self._width, self._graphs.kv.scratch
        assert scratch is not None
        tokens, positions, rows = [0] * width, [0] * width, [scratch] * width
        for work in batch:
            row = work.row.index
            (tokens[row],), positions[row], rows[row] = work.tokens, len(work.row.tokens), row
        yield from (tokens, positions, rows)
        for use in uses:
            yield _padded(use.tokens.order, width)
            yield _padded(list(chain.from_iterable(use.tokens.blocks)), 3 * width)


def rounded(size: int, fine: int) -> int:
    """A size that is no smaller: a power of two or, from `fine` on, 1.5 times one."""
    power = 1 << (size - 1).bit_length()
    between = power * 3 // 4
    return between if between > fine and size <= between else power


def _padded(numbers: list[int], size: int) -> list[int]:
    """With zeros: tokens that no block has, and blocks that have no tokens."""
    return numbers + [0] * (size - len(numbers))
