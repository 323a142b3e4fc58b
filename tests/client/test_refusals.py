"""Reasons reach the coordinator, file names and text do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from meadow import errors
from meadow.client.refusals import TOLD, outward

HOME = Path("/home/ada/.meadow/clients/x")
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.MeadowError)
    and kind is not errors.RecordError  # takes a reason besides; peers' alone
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_tells_where_files_are(kind: type[errors.MeadowError]) -> None:
    told = outward(kind(f"{HOME}/rows.jsonl line 3: is bad\n", "patient 7"), HOME)
    assert str(HOME) not in told and "\n" not in told and 0 < len(told) <= 200
    assert ("patient 7" in told) == (kind in TOLD)


def test_a_long_reason_is_cut() -> None:
    assert len(outward(errors.PolicyError("x" * 999), HOME)) == 200
