"""What a participant approves is exactly what its digest covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from homes import terms_json

from meadow import __version__
from meadow.client.terms import Terms
from meadow.config import Config
from meadow.errors import ConfigError, FormatError
from meadow.store import digest_of
from meadow.wire import canonical


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


def test_a_folder_without_terms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        Terms.load(tmp_path / "terms.json")
