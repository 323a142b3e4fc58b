"""A machine whose clock is wrong, for the processes that are started with this environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long ahead(void) {
    const char *seconds = getenv("TEST_CLOCK_AHEAD");
    return seconds ? atol(seconds) : 0;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(which, now);
    if (!code && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        now->tv_sec += ahead();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}
time_t time(time_t *kept) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (kept)
        *kept = exact.tv_sec;
    return exact.tv_sec;
}
"""

needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="makes a library that sets clocks wrong: needs Linux and cc",
)


def wrong_clock(folder: Path, seconds_ahead: int) -> dict[str, str]:
    """The environment of a process whose clock is so much ahead."""
    library = folder / "wrong_clock.so"
    if not library.exists():
        command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=_SHIM.encode(), check=True)
    return {"LD_PRELOAD": str(library), "TEST_CLOCK_AHEAD": str(seconds_ahead)}
