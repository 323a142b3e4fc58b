"""Participants whose clocks are wrong by a day, either way, take part like everybody else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from deployments import PEOPLE, Deployment, small_config
from wrong_clock import needs_a_compiler, wrong_clock

pytestmark = [pytest.mark.long(minutes=2), needs_a_compiler]

DAY = 86_400
EMAIL, HTTP = PEOPLE


def test_a_clock_wrong_by_a_day_is_no_matter(tmp_path: Path, short_path: Path) -> None:
    clocks = {EMAIL: wrong_clock(tmp_path, -DAY), HTTP: wrong_clock(tmp_path, DAY)}
    for name, ahead in ((EMAIL, -DAY), (HTTP, DAY)):
        assert abs(seen(clocks[name]) - time.time() - ahead) < DAY / 2
    with Deployment(short_path / "d", small_config(2), clocks) as deployment:
        deployment.start()
        deployment.begin(2)
        deployment.end(2)
        deployment.finish()
        assert "the run is finished" in deployment.client(HTTP, "status")
    assert deployment.left_behind() == []
    assert deployment.counted() == {n: dict.fromkeys(PEOPLE, 1) for n in (1, 2)}


def seen(environment: dict[str, str]) -> float:
    """What a process of such a machine takes for the time."""
    command = [sys.executable, "-c", "import time; print(time.time())"]
    return float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
