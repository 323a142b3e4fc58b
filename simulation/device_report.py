"""What a check of a device says as a program of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import MeadowError


def told(check: Callable[[str], dict[str, Any]], arguments: Sequence[str]) -> tuple[int, str]:
    """The exit status and the text: 0 or 1 and the report, by whether it has `passed`; or 2 and
    the line that says why there is none.  The device is the first argument, by default `cuda`."""
    try:
        report = check(arguments[0] if arguments else "cuda")
    except MeadowError as error:
        return 2, str(error)
    return int(not report["passed"]), json.dumps(report, indent=1)
