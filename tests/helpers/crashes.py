"""Programs that are ended at the steps of their disk, to be started again and looked at.

A program is a function of a root folder and a disk under it; faulty_disk.py has the disks and the
kinds of fault.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faulty_disk import Crash, Deadly, Faulty, Numbered

from meadow.errors import StorageError

Run = Callable[[Path, Numbered], object]


def steps(run: Run, root: Path, way: str = "") -> list[int]:
    """The steps, of a run in the new folder `root` that nothing ends, at which this kind of fault
    is possible."""
    root.mkdir()
    disk = Numbered(root)
    run(root, disk)
    shutil.rmtree(root)
    return disk.tearable if way == "torn" else list(range(1, disk.count + 1))


def interrupt(run: Run, disk: Faulty) -> Path:
    """Run until the fault; the folder in which the next start finds itself."""
    try:
        run(disk.root, disk)
    except Crash:
        return disk.survivor
    except StorageError:
        assert disk.way == "full"
        return disk.root
    raise AssertionError(f"step {disk.at} did not end the run")


def forked(run: Callable[[], object], seconds: float | None = None) -> bool:
    """Whether a child process that does `run` was killed, by itself or after `seconds`."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # a child that has ended waits to be asked how
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0
    return killed


def kill_at_every_step(folder: Path, run: Run, again: Callable[[Path], object]) -> int:
    """Fork a run, let it kill itself at each step, start it again; how many died."""
    deaths = 0
    for way in ("before", "torn"):
        for at in range(1, 10**6):
            root = folder / f"{way}{at}"
            root.mkdir()
            if not forked(partial(run, root, Deadly(root, at, way))):
                break
            deaths += 1
            again(root)
            shutil.rmtree(root)
    return deaths


def said_by(program: str, *arguments: str) -> str:
    """What a test file prints that is run as a program, with the helpers at hand: in a process of
    its own, that may fork."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
