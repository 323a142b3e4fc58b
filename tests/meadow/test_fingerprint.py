"""Fingerprints: what two people compare."""

from __future__ import annotations

import hashlib

from meadow.fingerprint import fingerprint


def test_a_fingerprint_is_half_of_the_hash_in_groups_of_four() -> None:
    shown = fingerprint(bytes(32))
    assert shown.replace(" ", "") == hashlib.sha256(bytes(32)).hexdigest()[:32]
    assert [len(group) for group in shown.split(" ")] == [4] * 8


def test_no_key_has_none() -> None:
    assert fingerprint(b"") == ""
