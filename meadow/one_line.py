"""Anybody's text as it can be shown in a terminal: one line, nothing that moves the cursor."""

from __future__ import annotations

LONGEST = 500
"""Characters; what is longer is cut."""


def one_line(text: str) -> str:
    """`text` with an escape in the place of every character that does not print, cut to LONGEST."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return "".join(shown)[:LONGEST]
