"""Whether a kernel of ours can be used on this machine: found out once, by a small case."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


def holds(trial: Callable[[], bool], what: str) -> bool:
    """Whether a kernel compiles and `trial` finds its result right; where not, the log says why.

    Triton builds what launches a kernel in C, with Python's headers: a machine may have Triton and
    a GPU, and neither of these.  `what` is then computed by torch alone.
    """
    try:
        reason = "" if trial() else "a kernel's result is wrong"
    except Exception as error:  # Triton's own, its C compiler's, or the device's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        _LOG.warning("%s will be computed without Triton, more slowly: %s", what, reason)
    return not reason
