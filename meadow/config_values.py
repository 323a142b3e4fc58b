"""Values from a file that somebody wrote by hand, held against the types that they should have."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from .errors import ConfigError


def checked(
    value: Any, hint: Any, where: str, least: float | None = None, most: float | None = None
) -> Any:
    """`value` as the type `hint` (int widens to float), or ConfigError at `where`.

    `least` and `most` bound a number; what a list or a table holds is checked by its own type.
    """
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            choices = ", ".join(repr(choice) for choice in get_args(hint))
            raise ConfigError(f"{where} is {value!r}", f"one of {choices}")
        return value
    if origin in (Union, types.UnionType):
        inner = [kind for kind in get_args(hint) if kind is not type(None)]
        return checked(value, inner[0], where, least, most)
    kind = origin or hint
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} is {value!r}", f"expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}", "expected a finite number")
    if kind is list:
        return [checked(item, get_args(hint)[0], where) for item in value]
    if kind is dict:
        part = get_args(hint)[1]
        return {key: checked(item, part, f"{where}.{key}") for key, item in value.items()}
    if least is not None and not value >= least:
        raise ConfigError(f"{where} is {value!r}", f"at least {least:g}")
    if most is not None and not value <= most:
        raise ConfigError(f"{where} is {value!r}", f"at most {most:g}")
    return value


def nearest(word: str, known: Mapping[str, Any]) -> str:
    """A hint for a word that is not known."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
