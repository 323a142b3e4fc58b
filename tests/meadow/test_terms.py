"""What a participant approves is exactly what its digest covers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from enrolment import new_identity
from homes import RUN, terms_json

from meadow import __version__
from meadow.canonical_json import canonical
from meadow.config import Config
from meadow.errors import FormatError
from meadow.store import digest_of
from meadow.terms import Terms, draft, fields_of

OPERATOR = new_identity()


def test_terms_hold_the_runs_settings(tiny: Config) -> None:
    config = tiny.replace(strategy={"name": "diloco", "options": {"outer_lr": 0.5}})
    terms = Terms.parse(terms_json(config))
    assert terms.config.shared() == config.shared()
    assert terms.config_digest == config.shared().digest()


def test_the_digest_is_that_of_the_canonical_json(tiny: Config) -> None:
    data = terms_json(tiny)
    fields = json.loads(data)
    expected = digest_of(canonical(fields).encode())
    spaced = json.dumps(fields, indent=2, sort_keys=True)
    assert Terms.parse(data).digest == Terms.parse(spaced).digest == expected
    assert Terms.parse(terms_json(tiny, note="é")).digest != expected  # nothing slips in unseen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "the terms have format 2, this meadow reads 1"),
        ({"meadow": "9.1.0"}, f"the run is of meadow '9.1.0', this is {__version__}"),
        ({"meadow": None}, "of meadow None"),
        ({"run": "../x"}, "run is not in hexadecimal"),
        ({"bundle": 5}, "bundle is not in hexadecimal"),
        ({"config_digest": "ab" * 32}, "not those of their config_digest"),
        ({"config": []}, "have no config"),
        ({"config": {"clients": {"step": 1}}}, "unknown key step"),
        ({"config": {"clinets": {}}}, "unknown section"),
    ],
)
def test_terms_that_cannot_be(tiny: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Terms.parse(terms_json(tiny, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_what_are_no_terms(data: bytes) -> None:
    with pytest.raises(FormatError):
        Terms.parse(data)


def test_a_patch_release_is_no_other_version(tiny: Config) -> None:
    release = ".".join([*__version__.split(".")[:2], "99"])
    Terms.parse(terms_json(tiny, meadow=release))


def test_what_a_coordinator_drafts_is_what_a_participant_reads(tiny: Config) -> None:
    fields = draft(tiny, "ab" * 32, "cd" * 32, "ef" * 32, OPERATOR)
    terms = Terms.parse(json.dumps(fields))
    assert (terms.run, terms.base_digest, terms.bundle) == ("ab" * 32, "cd" * 32, "ef" * 32)
    assert terms.config == tiny.shared() and terms.config.data.source == ""
    assert terms.coordinator == OPERATOR.public.public_bytes_raw().hex()
    assert fields_of(json.dumps(fields)) == json.loads(json.dumps(fields))


def test_another_versions_terms_can_still_be_told_apart(tiny: Config) -> None:
    """A coordinator that was updated goes on with the run that its older version began."""
    assert fields_of(terms_json(tiny, meadow="9.1.0"))["run"] == RUN
    for damaged in (terms_json(tiny, run=7), terms_json(tiny, base_digest="x"), b"{}", b"[7]"):
        with pytest.raises(FormatError):
            fields_of(damaged)
