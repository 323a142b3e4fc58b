"""What a resident trainer says of itself, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meadow.client import home
from meadow.client.outgoing_log import read
from meadow.client.resident_trainer import ResidentTrainer
from meadow.errors import TrainerError


def status(trainer: ResidentTrainer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(trainer.handle("status", b""))
    return found


def entries(folder: Path) -> list[tuple[str, int, int, bool]]:
    return [(e.kind, e.round, e.bytes, e.repeat) for e in read(folder / home.OUTGOING)]


def refused(trainer: ResidentTrainer, body: bytes, verb: str = "train") -> str:
    with pytest.raises(TrainerError) as caught:
        trainer.handle(verb, body)
    return str(caught.value)
