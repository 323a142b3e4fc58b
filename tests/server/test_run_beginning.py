"""A coordinator's folder: one run, whose terms change only where participants are told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from enrolment import new_identity
from faulty_disk import Crash, Faulty, Numbered
from homes import blueprint

from meadow import terms as terms_format
from meadow.config import Config
from meadow.errors import ConfigError, FormatError, JournalError, ModelError
from meadow.identity import Identity
from meadow.journal import Journal
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.run_beginning import begin, check_deployable, run_identity
from meadow.store import Disk, locked
from meadow.terms import Terms

OPERATOR = new_identity()
BUNDLE = "bb" * 32


def prepare(home: CoordinatorHome, config: Config, disk: Disk | None = None, **given: Any) -> bool:
    base = blueprint(config.model.base)
    arguments = {"blueprint": base, "bundle": BUNDLE, "identity": OPERATOR, **given}
    return begin(home, config, disk=disk or Disk(), **arguments)


def begun(folder: Path, config: Config) -> CoordinatorHome:
    home = CoordinatorHome(folder)
    assert not prepare(home, config)
    return home


def test_its_terms_are_what_a_participant_reads(tiny: Config, tmp_path: Path) -> None:
    home = begun(tmp_path / "c", tiny)
    terms = Terms.parse(home.terms.read_bytes())
    base = blueprint(tiny.model.base)
    assert terms.base_digest == base.digest and terms.bundle == BUNDLE
    assert terms.coordinator == OPERATOR.public.public_bytes_raw().hex()
    assert terms.config.shared() == tiny.shared() and terms.config.data.source == ""
    with Journal.open(home.run, run_identity(tiny, base)) as journal:
        assert journal.run_id == terms.run
    assert home.config() == tiny
    assert home.folder.stat().st_mode & 0o777 == 0o700


def test_going_on_changes_nothing_that_was_approved(tiny: Config, tmp_path: Path) -> None:
    home = begun(tmp_path / "c", tiny)
    terms = home.terms.read_bytes()
    moved = tiny.replace(
        coordinator={"listen": "0.0.0.0:1", "addresses": ["b.example:1"]}, data={"source": "nano"}
    )
    assert not prepare(home, moved, identity=new_identity())  # by another user, or elsewhere
    assert home.terms.read_bytes() == terms
    assert home.config() == moved


def test_a_server_app_that_still_works_is_not_in_the_way(tiny: Config, tmp_path: Path) -> None:
    """After a kill of the coordinator its server app may hold the journal for a while."""
    home = begun(tmp_path / "c", tiny)
    with Journal.open(home.run, run_identity(tiny, blueprint(tiny.model.base))):
        assert not prepare(home, tiny)


@pytest.mark.parametrize("section", [{"rounds": {"count": 9}}, {"clients": {"lr": 1.0}}])
def test_other_settings_are_another_run(
    tiny: Config, tmp_path: Path, section: dict[str, Any]
) -> None:
    home = begun(tmp_path / "c", tiny)
    terms = home.terms.read_bytes()
    with pytest.raises(JournalError, match="other settings, which participants approved"):
        prepare(home, tiny.replace(**section))
    assert home.terms.read_bytes() == terms and home.config() == tiny


def test_another_base_under_the_same_name_is_refused(tiny: Config, tmp_path: Path) -> None:
    home = begun(tmp_path / "c", tiny)
    other = dataclasses.replace(blueprint(tiny.model.base), digest="00" * 32)
    with pytest.raises(JournalError, match="another than the run began with"):
        prepare(home, tiny, blueprint=other)


def test_another_version_goes_on_and_says_that_participants_have_to_agree(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = begun(tmp_path / "c", tiny)
    run = Terms.parse(home.terms.read_bytes()).run
    assert prepare(home, tiny, bundle="cc" * 32)
    assert not prepare(home, tiny, bundle="cc" * 32)
    monkeypatch.setattr(terms_format, "__version__", "9.9.9")
    assert prepare(home, tiny, bundle="cc" * 32)
    terms = json.loads(home.terms.read_text())
    assert terms["run"] == run and terms["meadow"] == "9.9.9"


def test_the_key_that_was_approved_stays_with_the_folder(tiny: Config, tmp_path: Path) -> None:
    home = begun(tmp_path / "c", tiny)
    assert home.identity().key_id == OPERATOR.key_id
    assert home.identity_file.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(home.identity_file).key_id == OPERATOR.key_id
    home.identity_file.unlink()
    with pytest.raises(ConfigError, match="there is no .*identity.pem .restore it"):
        home.identity()


def test_preparing_can_be_cut_short_anywhere_and_done_again(tiny: Config, tmp_path: Path) -> None:
    disk = Numbered(tmp_path)
    prepare(CoordinatorHome(tmp_path / "whole"), tiny, disk)
    assert disk.count > 15
    for at in range(1, disk.count + 1):
        for way in ("before", "after"):
            root = tmp_path / f"{way}{at}"
            root.mkdir()
            home = CoordinatorHome(root / "c")
            with pytest.raises(Crash):
                prepare(home, tiny, Faulty(root, at, way))
            assert not prepare(home, tiny)
            with Journal.open(home.run, run_identity(tiny, blueprint(tiny.model.base))) as journal:
                assert journal.run_id == Terms.parse(home.terms.read_bytes()).run


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "null"])
def test_terms_that_are_damaged_are_named(tiny: Config, tmp_path: Path, text: str) -> None:
    home = begun(tmp_path / "c", tiny)
    home.terms.write_text(text)
    with pytest.raises(FormatError, match=r"terms.json: the terms.*restore it from a backup"):
        prepare(home, tiny)


def test_terms_of_another_format_are_refused_by_name(tiny: Config, tmp_path: Path) -> None:
    home = begun(tmp_path / "c", tiny)
    home.terms.write_text(home.terms.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FormatError, match="have format 2, this meadow reads 1 .restore it"):
        prepare(home, tiny)


def test_a_folder_of_something_else_is_no_coordinators(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no coordinator's folder"):
        CoordinatorHome(tmp_path).config()


def test_it_runs_as_long_as_its_lock_is_held(tmp_path: Path) -> None:
    home = CoordinatorHome(tmp_path)
    assert not home.running
    with locked(home.lock, ""):
        assert home.running
    assert not home.running


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"simulation": {"engine": "fused"}}, "is for one machine"),
        ({"strategy": {"name": "fedavg"}}, "fedavg"),
        ({"model": {"rank": 500}}, "rank = 500"),
        ({"serve": {"name": "mail", "dtype": "bfloat16"}}, "it is served in bfloat16"),
    ],
)
def test_what_cannot_be_deployed_is_said_before_anyone_is_invited(
    tiny: Config, changes: dict[str, Any], error: str
) -> None:
    check_deployable(tiny, blueprint(tiny.model.base))
    with pytest.raises((ConfigError, ModelError), match=error):
        check_deployable(tiny.replace(**changes), blueprint(tiny.model.base))


def test_a_run_knows_its_server_apps_threads_whoever_begins_it(tiny: Config) -> None:
    """Not those of the operator's command: each run would be told that its machine has changed."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        base = blueprint(tiny.model.base)
        found = run_identity(tiny.replace(simulation={"threads": 1}), base).environment["threads"]
        default = run_identity(tiny.replace(simulation={"threads": 0}), base).environment["threads"]
    finally:
        torch.set_num_threads(before)
    assert (found, default) == ("1", "2")
