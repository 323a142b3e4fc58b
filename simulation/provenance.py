"""Where and when a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Where and when a figure was measured; a changed checkout's commit ends in -dirty."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    hardware = (
        f"{platform.machine()}, {cores} cores, torch {torch.__version__}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}"
    )
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    return {"hardware": hardware, "commit": _commit(), "date": time.strftime("%Y-%m-%d")}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git here
        return "unknown"
    return told.stdout.strip() or "unknown"
