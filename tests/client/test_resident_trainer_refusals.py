"""What the resident trainer refuses, and in what folder it does not start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from homes import make_home, message, set_policy, terms_json
from trainers import entries, refused, status

from meadow.client import home
from meadow.client.outgoing_log import read
from meadow.client.resident_trainer import ResidentTrainer
from meadow.config import Config
from meadow.errors import ConfigError, IdentityError, JournalError, MeadowError, PolicyError
from meadow.store import digest_of
from meadow.strategies.messages import pack_update, unpack_update


@pytest.fixture
def folder(tmp_path: Path, tiny: Config) -> Path:
    return make_home(tmp_path / "ada", tiny)


@pytest.fixture
def trainer(folder: Path) -> Iterator[ResidentTrainer]:
    with ResidentTrainer(folder) as one:
        yield one


# What it refuses


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_messages_outside_the_approved_terms(
    trainer: ResidentTrainer, folder: Path, tiny: Config, verb: str
) -> None:
    other = tiny.replace(clients={"lr": 1.0}).shared().digest()
    assert "run 'ffff', approved is '0123abcd'" in refused(trainer, message(tiny, run="ffff"), verb)
    assert f"config '{other}'" in refused(trainer, message(tiny, config=other), verb)
    assert "received a turn of 'bob'" in refused(trainer, message(tiny, name="bob"), verb)
    assert "no round 3" in refused(trainer, message(tiny, 3), verb)
    old = message(tiny).replace(b'"meadow":"1"', b'"meadow":"7"')
    assert "has format '7', this meadow reads '1'" in refused(trainer, old, verb)
    kinds = {kind for kind, *_ in entries(folder)}
    assert kinds == {"refusal"} and len(entries(folder)) == 5
    assert status(trainer)["base"]["loads"]["count"] == 0  # refused before any work


def test_a_changed_count_in_the_turn(trainer: ResidentTrainer, tiny: Config) -> None:
    turn = unpack_update(message(tiny))[1]["turn"]
    for key, value, reason in [
        ("steps", 3, "steps 3, approved is 2"),
        ("seed", 9, "seed 9"),
        ("rounds", 7, "rounds 7"),
        ("round", -1, "cannot be true"),
        ("round", "1", "cannot be true"),
        ("joined", 1.5, "cannot be true"),
        ("cohort", [1], "no text"),
        ("cohort", ["bob"], "not in the cohort"),
        ("extra", 1, "does not say whose turn"),
    ]:
        assert reason in refused(trainer, message(tiny, turn={**turn, key: value}))


def test_an_unknown_verb(trainer: ResidentTrainer, folder: Path) -> None:
    assert "known: train, evaluate, status, dry-run" in refused(trainer, b"", "query")
    assert entries(folder) == []


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"least_cohort": 4}, "the round has 3 participants"),
        ({"most_download_mb": 0.0001}, "MB of messages a round"),
        ({"most_upload_mb": 0.0001}, "MB of answers a round"),
        ({"most_memory_mb": 1}, "more than 1 MB of memory"),
        ({"most_seconds": 1e-9}, "more than 1e-09 seconds"),
        ({"hours": ["03:00-03:01"]}, "outside the hours"),
        ({"terms": "ab"}, "the run's terms are not those that were approved"),
        ({"coordinator": "ab"}, "a coordinator that was not approved"),
        ({"base_digests": ["ab"]}, "is not allowed here"),
        ({"most_steps": 1}, "2 steps a round"),
        ({"largest_update": 1.0}, "clip_update = 0"),
    ],
)
def test_what_the_policy_does_not_allow(
    folder: Path, tiny: Config, rules: dict[str, Any], reason: str
) -> None:
    with ResidentTrainer(folder, clock=lambda: 1_790_000_000.0) as trainer:
        set_policy(folder, data=["rows.jsonl"], **rules)
        assert reason in refused(trainer, message(tiny))
        set_policy(folder, data=["rows.jsonl"])  # read anew with every request
        trainer.handle("train", message(tiny))
    assert [kind for kind, *_ in entries(folder)] == ["refusal", "train"]


def test_rounds_a_day_count_over_restarts_and_a_repeat_is_none(folder: Path, tiny: Config) -> None:
    set_policy(folder, data=["rows.jsonl"], rounds_a_day=1)
    now = [1_790_000_000.0]
    with ResidentTrainer(folder, clock=lambda: now[0]) as trainer:
        trainer.handle("train", message(tiny, 1))
    with ResidentTrainer(folder, clock=lambda: now[0]) as trainer:
        trainer.handle("train", message(tiny, 1))
        now[0] += 86_399
        assert "2 rounds in 24 hours" in refused(trainer, message(tiny, 2))
        trainer.handle("evaluate", message(tiny, 2))  # a measurement is no round
        now[0] += 2
        trainer.handle("train", message(tiny, 2))


def test_a_paused_participant(trainer: ResidentTrainer, folder: Path, tiny: Config) -> None:
    (folder / home.PAUSED).touch()
    assert "the participant has paused" in refused(trainer, message(tiny))
    assert status(trainer)["paused"]
    (folder / home.PAUSED).unlink()
    trainer.handle("train", message(tiny))


def test_changed_rows_are_refused_until_restored_or_accepted(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    trainer.handle("train", message(tiny, 1))
    rows = folder / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("say a", "say z"))
    reason = refused(trainer, message(tiny, 2))
    assert "text has changed since the run began" in reason and "data_changes" in reason
    rows.write_text(before)
    trainer.handle("evaluate", message(tiny, 1))
    rows.write_text(before.splitlines()[0] + "\n")
    set_policy(folder, data=["rows.jsonl"], data_changes="accept")
    trainer.handle("train", message(tiny, 2))
    assert status(trainer)["text"]["train"] == 1


def test_rows_that_changed_while_nothing_ran_are_noticed(folder: Path, tiny: Config) -> None:
    with ResidentTrainer(folder) as trainer:
        trainer.handle("train", message(tiny, 1))
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with ResidentTrainer(folder) as trainer:
        trainer.warm()
        assert "text has changed" in status(trainer)["fault"]
        assert "text has changed" in refused(trainer, message(tiny, 2))


def test_the_coordinator_hears_nothing_of_files(folder: Path, tiny: Config) -> None:
    rows = folder / "rows.jsonl"
    good = rows.read_text()
    rows.write_text('{"prompt": "a secret"\n')
    with ResidentTrainer(folder) as trainer:
        assert refused(trainer, message(tiny)) == "the participant's text cannot be used"
        (entry,) = read(folder / home.OUTGOING)
        assert "rows.jsonl line 1: malformed JSON" in entry.about["detail"]
        assert entry.sha256 == digest_of(entry.about["reason"].encode())
        rows.write_text(good)  # mended without a restart
        trainer.handle("train", message(tiny))


def test_another_base_is_refused_by_its_digest(tmp_path: Path, tiny: Config) -> None:
    folder = make_home(tmp_path / "ada", tiny)
    (folder / home.TERMS).write_bytes(terms_json(tiny, base_digest="ab" * 32))
    set_policy(folder, data=["rows.jsonl"])
    with ResidentTrainer(folder) as trainer:
        reasons = {refused(trainer, message(tiny)) for _ in range(2)}
        assert len(reasons) == 1 and f"the run's {'ab' * 8}" in reasons.pop()
        assert status(trainer)["base"]["loads"]["count"] == 0


def test_a_defect_is_told_without_its_text(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    broken = unpack_update(message(tiny))
    tensors = dict(list(broken[0].tensors.items())[:1])
    header = {key: broken[1][key] for key in ("turn", "run", "config")}
    body = pack_update(dataclasses.replace(broken[0], tensors=tensors), **header)
    assert refused(trainer, body) == "the participant's trainer met a defect"
    assert status(trainer)["recent"][-1]["outcome"] == "the participant's trainer met a defect"
    trainer.handle("train", message(tiny))
    assert [kind for kind, *_ in entries(folder)] == ["refusal", "train"]


# Starting


def test_one_trainer_a_folder(trainer: ResidentTrainer, folder: Path) -> None:
    with pytest.raises(JournalError, match="its trainer runs already"):
        ResidentTrainer(folder)


def spoil(folder: Path, what: str) -> None:
    if what == "open folder":
        folder.chmod(0o750)
    elif what == "open policy":
        (folder / home.POLICY).chmod(0o620)
    elif what == "no terms":
        (folder / home.TERMS).unlink()
    elif what == "other terms":
        set_policy(folder, terms="ab")
    elif what == "no name":
        (folder / home.MEMBERSHIP).write_text("{}")
    else:
        (folder / home.OUTGOING).write_text("nonsense\n")


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("open folder", IdentityError),
        ("open policy", IdentityError),
        ("no terms", ConfigError),
        ("other terms", PolicyError),
        ("no name", ConfigError),
        ("forged log", JournalError),
    ],
)
def test_a_folder_that_nothing_can_start_in(
    folder: Path, what: str, kind: type[MeadowError]
) -> None:
    spoil(folder, what)
    with pytest.raises(kind):
        ResidentTrainer(folder)
    if what == "forged log":
        (folder / home.OUTGOING).unlink()
        ResidentTrainer(folder).close()  # the failed start holds no lock
