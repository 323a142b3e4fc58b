"""How a prompt stands before its response where the tokenizer has no chat template."""

from __future__ import annotations


def joint(prompt: str) -> str:
    """What stands between the two: nothing after white space, else a line break."""
    return "" if not prompt or prompt[-1].isspace() else "\n"
