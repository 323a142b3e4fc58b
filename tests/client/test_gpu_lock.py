"""One run per GPU, whatever GPU this machine has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meadow.client.gpu_lock import gpu_claimed
from meadow.errors import ModelError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An invented GPU, which can be exchanged."""
    properties = SimpleNamespace(uuid="a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_second_run_is_kept_away_until_the_first_ends(
    gpu: SimpleNamespace, tmp_path: Path, device: str
) -> None:
    with gpu_claimed(device, tmp_path):
        with pytest.raises(ModelError, match="another run"), gpu_claimed("cuda", tmp_path):
            pytest.fail("both hold the GPU")
        gpu.uuid = "b"
        with gpu_claimed(device, tmp_path):  # a second GPU takes a second run
            gpu.uuid = "a"
    with gpu_claimed(device, tmp_path):
        assert (tmp_path / "gpu-a.lock").exists()


def test_an_error_of_the_run_itself_is_its_own(gpu: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), gpu_claimed("cuda", tmp_path):
        raise ZeroDivisionError


def test_a_run_on_the_cpu_needs_none(gpu: SimpleNamespace, tmp_path: Path) -> None:
    with gpu_claimed("cpu", tmp_path), gpu_claimed("cpu", tmp_path):
        assert not list(tmp_path.iterdir())
