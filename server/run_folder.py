"""What a run's folder holds besides its journal, whoever runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config, precision
from ..events import Event, EventLog, Observer, tee
from ..journal import Journal
from ..peft_adapters.manifest import Provenance
from ..store import Disk


def environment() -> dict[str, str]:
    """What bit-for-bit equality depends on besides the settings."""
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": str(torch.version.cuda and torch.cuda.is_available()),
    }


@contextmanager
def traces(journal: Journal, folder: Path, disk: Disk) -> Iterator[Observer]:
    """An observer that keeps events.jsonl and metrics.jsonl."""
    log = EventLog(folder / "events.jsonl")
    try:
        yield tee(log, _metrics_writer(journal, folder, disk))
    finally:
        log.close()


@dataclass(frozen=True)
class HeldOut:
    """The rows on which a run's losses are measured, as far as who runs it knows them."""

    rows: int | None = None
    digest: str = ""


def provenance(
    config: Config,
    base_digest: str,
    participants: int,
    personal: bool,
    journal: Journal,
    number: int,
    held_out: HeldOut,
) -> Provenance:
    """What the manifest says of a run after the round `number`."""
    rows = {row["round"]: row for row in journal.metrics()}
    return Provenance(
        run_id=journal.run_id,
        base_digest=base_digest,
        config_digest=config.digest(),
        strategy=config.strategy.name,
        rounds=number,
        participants=participants,
        seed=config.rounds.seed,
        base_loss=rows[0].get("loss"),
        # the losses of personal adapters are not those of the shared one
        loss=None if personal else rows[number].get("loss"),
        dtype=precision(config.model.dtype, config.model.quantize),
        held_out_rows=held_out.rows,
        held_out_digest=held_out.digest,
    )


def _metrics_writer(journal: Journal, folder: Path, disk: Disk) -> Observer:
    """Keeps metrics.jsonl equal to the journal: written whole, so no crash can leave it torn."""

    def keep(event: Event) -> None:
        if event.kind in ("run_started", "round_closed"):
            rows = (json.dumps(row, separators=(",", ":")) + "\n" for row in journal.metrics())
            disk.write(folder / "metrics.jsonl", "".join(rows).encode())

    return keep
