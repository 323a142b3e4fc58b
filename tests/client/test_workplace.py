"""What a trainer could not have at first, and has later without a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from homes import make_home, message

from meadow.client import workplace
from meadow.client.resident_trainer import ResidentTrainer
from meadow.config import Config
from meadow.errors import ModelError, TrainerError


def test_a_gpu_that_another_run_had_is_taken_once_it_is_free(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders, claims = ["another run"], []

    @contextmanager
    def claimed(device: str, folder: Path) -> Iterator[None]:
        if holders:
            raise ModelError("another run of this user trains on the GPU", "wait for it")
        claims.append(device)
        yield

    monkeypatch.setattr(workplace, "gpu_claimed", claimed)
    with ResidentTrainer(make_home(tmp_path / "ada", tiny)) as trainer:

        def fault() -> str:
            return str(json.loads(trainer.handle("status", b""))["fault"])

        with pytest.raises(TrainerError, match="base model cannot be used"):
            trainer.handle("train", message(tiny))
        assert "another run" in fault()
        holders.clear()
        assert trainer.handle("train", message(tiny))
        assert trainer.handle("evaluate", message(tiny)) and fault() == ""
    assert claims == [tiny.model.device]  # once, and kept
