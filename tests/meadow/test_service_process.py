"""A process of a deployment ends when it is asked to, and says in one line what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BEGIN = """
import asyncio, os, signal
from meadow.errors import ConfigError
from meadow.service_process import asked_to_end, service_process
async def serve():
    ended = asked_to_end()
    {body}
with service_process():
    asyncio.run(serve())
"""


def ran(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN.format(body=body)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_ends_in_order_when_it_is_asked_to(name: str) -> None:
    done = ran(f"os.kill(os.getpid(), signal.{name}); await ended.wait()")
    assert done.returncode == 0 and not done.stderr


def test_a_mistake_is_one_line_and_status_2() -> None:
    done = ran("raise ConfigError('there is no folder', 'make it')")
    assert done.returncode == 2
    assert done.stderr.endswith(" ERROR there is no folder (make it)\n")
    assert done.stderr.count("\n") == 1


def test_a_defect_shows_where_it_is() -> None:
    done = ran("raise ValueError('of ours')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "of ours" in done.stderr
