"""What a coordinator hears when a participant refuses: nothing of the participant's files."""

from __future__ import annotations

from pathlib import Path

from ..errors import (
    ConfigError,
    DataError,
    FormatError,
    MeadowError,
    ModelError,
    PolicyError,
    StorageError,
    TrainerError,
    UpdateError,
)
from .peer_net import one_line

TOLD = (PolicyError, FormatError, UpdateError, TrainerError)
"""Errors that are about the request: their reason is told as it is."""

DEFECT = "the participant's trainer met a defect"

_WITHHELD = {
    DataError: "the participant's text cannot be used",
    ModelError: "the participant's base model cannot be used",
    ConfigError: "the participant's settings cannot be used",
    StorageError: "the participant's disk cannot be used",
}
"""What is said instead of errors that name files or quote from them."""


def outward(error: MeadowError, folder: Path) -> str:
    """The reason to tell, in one line; `folder` is the participant's, whose name is left out."""
    if isinstance(error, TOLD):
        return one_line(str(error).replace(str(folder), "..."))
    known = [text for kind, text in _WITHHELD.items() if isinstance(error, kind)]
    return known[0] if known else "the participant's own files cannot be used"
