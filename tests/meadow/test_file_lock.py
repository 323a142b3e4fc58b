"""Locks between processes: held while the holder lives, seen without being taken."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from meadow.errors import JournalError
from meadow.file_lock import is_held
from meadow.store import locked

HOLD = """
import sys, pathlib
from meadow.store import locked
with locked(pathlib.Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    path = tmp_path / "some.lock"
    assert not is_held(path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert is_held(path) and is_held(path)
        with pytest.raises(JournalError, match=r"another process is working in .* \(ask it\)"):
            with locked(path, "ask it"):
                raise AssertionError
        holder.kill()
    assert not is_held(path)
    with locked(path, ""):
        assert is_held(path)


def test_who_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
    path, done = tmp_path / "some.lock", threading.Event()

    def look() -> None:
        while not done.is_set():
            is_held(path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with locked(path, ""):
                pass
    finally:
        done.set()
        watcher.join()
