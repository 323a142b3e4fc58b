"""Peaks of other processes, against what they are known to have allocated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meadow.errors import MeadowError
from meadow.simulation.process_peaks import ProcessPeaks, peak_of, pid_in, pids_in

SIZE = 150 * 2**20
HOARDER = f"x = b'x' * {SIZE}; del x; print('done', flush=True); input()"


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python that has come to its first line of output and waits for its input's end."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def test_a_peak_is_kept_after_its_memory_was_given_back() -> None:
    with process(HOARDER) as hoarder, process("print(1); input()") as modest:
        assert SIZE < peak_of(hoarder.pid) < 2 * SIZE
        assert 2**20 < peak_of(modest.pid) < SIZE / 3


def test_the_largest_life_of_a_name_counts() -> None:
    pids: dict[str, int] = {}
    with ProcessPeaks(lambda: pids) as peaks:
        with process(HOARDER) as first:
            pids["worker"] = first.pid
            deadline = time.monotonic() + 30
            while not peaks.peaks() and time.monotonic() < deadline:
                time.sleep(0.01)
        with process("print(1); input()") as second:
            pids["worker"] = second.pid
            peaks.look()
    assert peaks.peaks()["worker"] > SIZE
    peaks.look()  # it has ended by now
    assert peaks.peaks()["worker"] > SIZE


def test_what_has_ended_has_no_memory(tmp_path: Path) -> None:
    assert peak_of(2**22 + 1) == 0
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tgone\nState:\tZ (zombie)\n")
    assert peak_of(7, tmp_path) == 0


def test_elsewhere_than_on_linux_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeadowError, match="on Linux alone"):
        ProcessPeaks(dict, tmp_path)


def test_process_ids_are_read_where_there_are_any(tmp_path: Path) -> None:
    record, file = tmp_path / "processes.json", tmp_path / "app.pid"
    assert pids_in(record) == {} and pid_in(file) == 0
    record.write_text(json.dumps({"gateway": 12, "superlink": 13}))
    file.write_text("14")
    assert pids_in(record) == {"gateway": 12, "superlink": 13} and pid_in(file) == 14
    record.write_text("{")
    file.write_text("")
    assert pids_in(record) == {} and pid_in(file) == 0
