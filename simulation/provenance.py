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
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    cores, threads = os.cpu_count(), torch.get_num_threads()
    hardware = (
        f"{platform.machine()}, {cores} cores, torch {torch.__version__}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}"
    )
    return {
        "hardware": hardware,
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
