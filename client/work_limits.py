"""What one request may cost this machine, looked at between two training steps.

A step that has begun is finished: memory and time can be exceeded by what one step takes.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import MeadowError, PolicyError
from .policy import MB, Policy

_STATUS = Path("/proc/self/statm")


class Stopping(MeadowError):
    """The trainer ends; the same request will be answered by the next one."""


def resident_mb() -> float:
    """Resident memory of this process in MB; its peak where the system tells nothing else."""
    if _STATUS.exists():
        return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


class WorkLimits:
    """Counts the steps of one request and stops it where the policy says so."""

    def __init__(
        self,
        policy: Policy,
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], float] = resident_mb,
    ) -> None:
        self.steps = 0
        self._policy, self._stop, self._clock, self._memory = policy, stop, clock, memory
        self._begun = clock()

    def step(self, steps: int) -> None:
        """So many more steps were made.  Raises as `check`."""
        self.steps += steps
        self.check()

    def check(self) -> None:
        """Raise PolicyError where a limit is passed, and Stopping where the trainer ends."""
        if self._stop.is_set():
            raise Stopping("the trainer is stopping")
        policy = self._policy
        if policy.most_steps and self.steps > policy.most_steps:
            raise _stopped(f"more than {policy.most_steps} steps")
        if policy.most_seconds and self._clock() - self._begun > policy.most_seconds:
            raise _stopped(f"more than {policy.most_seconds:g} seconds")
        if policy.most_memory_mb and self._memory() > policy.most_memory_mb:
            raise _stopped(f"more than {policy.most_memory_mb} MB of memory")


def _stopped(limit: str) -> PolicyError:
    return PolicyError(f"the work was stopped here: it took {limit}", "the participant's own limit")
