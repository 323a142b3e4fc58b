"""The one JSON text of a value: what is signed, hashed or compared has no second spelling."""

from __future__ import annotations

import json
from typing import Any

Json = Any  # what json.dumps takes


def canonical(value: Json) -> str:
    """Keys sorted, no spaces, no escapes but JSON's own.

    Raises ValueError where a number is not finite.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
