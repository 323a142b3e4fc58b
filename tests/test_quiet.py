"""Nothing phones home: every switch is off by default, and a whole run opens no connection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import meadow

LISTED = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}

RUN = """
import socket
import sys

def refuse(*what, **more):
    raise SystemExit(f"something connects: {what!r}")  # no library catches it as a mere error

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.create_connection = socket.getaddrinfo = refuse

from pathlib import Path
from tiny import tiny_config
from meadow.simulation.engine import simulate

config = tiny_config(Path(sys.argv[1])).replace(rounds={"count": 1})
result = simulate(config, Path(sys.argv[1]) / "run")
assert result.adapter.is_dir() and result.metrics[1]["contributions"] == 3
"""


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without any of meadow's switches but `variables`."""
    clean = {name: value for name, value in os.environ.items() if name not in meadow.QUIET}
    helpers = str(Path(__file__).parent / "helpers")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, "PYTHONPATH": helpers, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_meadow_switches_telemetry_off() -> None:
    assert LISTED.items() <= meadow.QUIET.items()
    done = python("import os, meadow; print({n: os.environ[n] for n in meadow.QUIET})")
    assert done.stdout.strip() == repr(meadow.QUIET)


def test_a_users_own_choice_stays() -> None:
    code = "import os, meadow; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    assert python(code, FLWR_TELEMETRY_ENABLED="1").stdout.strip() == "1"


def test_a_run_opens_no_connection(tmp_path: Path) -> None:
    done = python(RUN, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_check_would_notice_a_connection() -> None:
    guard = RUN.partition("from pathlib")[0]
    for attempt in (
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket().connect(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
    ):
        done = python(guard + attempt)
        assert done.returncode != 0 and "something connects" in done.stderr
