"""How the machines differ that a run has worked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def machine_changes(seen: Sequence[Mapping[str, str]]) -> str:
    """`key a -> b` of everything that was not the same in all environments."""
    parts = []
    for key in sorted({key for environment in seen for key in environment}):
        values = list(dict.fromkeys(environment.get(key, "unknown") for environment in seen))
        if len(values) > 1:
            parts.append(f"{key} {' -> '.join(values)}")
    return ", ".join(parts)
