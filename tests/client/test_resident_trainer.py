"""The resident trainer: what it refuses and keeps, and that its bytes are the local engine's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from appending_disk import Appending
from faulty_disk import Crash, Faulty, Numbered
from homes import NAMES, RUN, make_home, message, set_policy, terms_json

from meadow.client import home
from meadow.client.outbox import Outbox
from meadow.client.outgoing_log import read, verify
from meadow.client.resident_trainer import ResidentTrainer
from meadow.client.trainer_link import TrainerLink
from meadow.client.trainer_socket import TrainerSocket
from meadow.client.work_limits import Stopping
from meadow.config import Config
from meadow.errors import (
    ConfigError,
    IdentityError,
    JournalError,
    MeadowError,
    PolicyError,
    StorageError,
    TrainerError,
)
from meadow.journal import Journal, RunIdentity
from meadow.server.coordinator import Coordinator, Refusal
from meadow.simulation.engine import Lab, simulate
from meadow.store import digest_of
from meadow.strategies.messages import pack_update, unpack_update
from meadow.strategies.transforms import make_transforms


def status(trainer: ResidentTrainer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(trainer.handle("status", b""))
    return found


def entries(folder: Path) -> list[tuple[str, int, int, bool]]:
    return [(e.kind, e.round, e.bytes, e.repeat) for e in read(folder / home.OUTGOING)]


@pytest.fixture
def folder(tmp_path: Path, tiny: Config) -> Path:
    return make_home(tmp_path / "ada", tiny)


@pytest.fixture
def trainer(folder: Path) -> Iterator[ResidentTrainer]:
    with ResidentTrainer(folder) as one:
        yield one


# Equality with the local engine


class Trainers:
    """Resident trainers as a coordinator's peers."""

    def __init__(self, config: Config, trainers: dict[str, ResidentTrainer]) -> None:
        self.config, self.trainers = config, trainers
        self.answers: dict[tuple[str, str, int], bytes] = {}

    def names(self) -> list[str]:
        return sorted(self.trainers)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        return [[name] for name in cohort]

    def ask(
        self, verb: str, names: Sequence[str], payload: Callable[[str], bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        for name in names:
            update, header = unpack_update(payload(name))
            own = {"turn": header["turn"], "run": RUN, "config": self.config.shared().digest()}
            answer = self.trainers[name].handle(verb, pack_update(update, **own))
            self.answers[verb, name, header["turn"]["round"]] = answer
            yield name, answer


@pytest.mark.parametrize(
    ("strategy", "clients"),
    [("fedavg_lora", {"wire": "bfloat16"}), ("diloco", {"clip_update": 0.5}), ("fedkseed", {})],
)
def test_contributions_and_state_equal_the_local_engines(
    tmp_path: Path, tiny: Config, lab: Lab, strategy: str, clients: dict[str, Any]
) -> None:
    config = tiny.replace(strategy={"name": strategy}, clients=clients)
    local = simulate(config, tmp_path / "local", lab)
    identity = RunIdentity(config.digest(), lab.base.digest, {})
    trainers = {n: ResidentTrainer(make_home(tmp_path / n, config, n)) for n in NAMES}
    peers = Trainers(config, trainers)
    transforms = make_transforms(config.clients.clip_update, config.clients.wire)
    with Journal.open(tmp_path / "remote", identity) as journal:
        Coordinator(config, lab.strategy(config), journal, peers, transforms).run()
        last, rows = journal.last(), list(journal.metrics())
    with Journal.open(tmp_path / "local", local_identity(config, lab)) as journal:
        assert journal.last() == last
        assert [row["losses"] for row in journal.metrics()] == [row["losses"] for row in rows]
        local_run = journal.run_id
    for name in NAMES:
        engine = Outbox(tmp_path / "local" / "clients", name, local_run)
        for round in (1, 2):
            assert engine.pending(round) == peers.answers["train", name, round]
        trainers[name].close()
    assert local.loss < local.base_loss


def local_identity(config: Config, lab: Lab) -> RunIdentity:
    from meadow.server.run_folder import environment

    return RunIdentity(config.digest(), lab.base.digest, environment())


# What it keeps


def test_the_base_is_loaded_once_and_later_rounds_load_nothing(
    trainer: ResidentTrainer, tiny: Config
) -> None:
    trainer.warm()
    for round in (1, 2):
        trainer.handle("train", message(tiny, round))
        trainer.handle("evaluate", message(tiny, round))
    found = status(trainer)
    assert found["base"]["loads"]["count"] == 1 == found["text"]["loads"]["count"]
    assert found["base"]["loads"]["seconds"] > 0
    asked = [(r["verb"], r["round"], r["steps"], r["outcome"]) for r in found["recent"]]
    assert asked == [
        ("train", 1, 2, "answered"),
        ("evaluate", 1, 0, "answered"),
        ("train", 2, 2, "answered"),
        ("evaluate", 2, 0, "answered"),
    ]
    assert all(r["seconds"] > 0 for r in found["recent"])
    # Looking at the text's files is not loading: nothing of the base or the text was read.
    assert [r["loading_seconds"] for r in found["recent"]] == [0.0] * 4


def test_a_fresh_process_repeats_the_same_bytes_and_logs_them_as_a_repeat(
    folder: Path, tiny: Config
) -> None:
    with ResidentTrainer(folder) as first:
        answer = first.handle("train", message(tiny))
        assert first.handle("train", message(tiny)) == answer
    with ResidentTrainer(folder) as second:
        assert second.handle("train", message(tiny)) == answer
        assert status(second)["recent"][0]["steps"] == 0  # nothing was computed
    assert entries(folder) == [("train", 1, len(answer), repeat) for repeat in (False, True, True)]
    logged = read(folder / home.OUTGOING)[0]
    assert logged.sha256 == digest_of(answer) and logged.received == len(message(tiny))
    assert logged.about["tensors"] == len(unpack_update(answer)[0].tensors)


def test_memory_goes_on_over_a_restart(tmp_path: Path, tiny: Config) -> None:
    """DiLoCo keeps its inner optimiser: round 2 of a new process is that of the old one."""
    config = tiny.replace(strategy={"name": "diloco"})
    answers = []
    for restarted in (False, True):
        folder = make_home(tmp_path / str(restarted), config)
        trainer = ResidentTrainer(folder)
        trainer.handle("train", message(config, 1))
        if restarted:
            trainer.close()
            trainer = ResidentTrainer(folder)
        answers.append(trainer.handle("train", message(config, 2)))
        trainer.close()
    assert answers[0] == answers[1]


@pytest.mark.long
@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_every_crash_is_answered_with_the_same_bytes_that_the_log_holds(
    tmp_path: Path, tiny: Config, way: str
) -> None:
    whole = make_home(tmp_path / "whole" / "ada", tiny)
    disk = Numbered(whole)
    with ResidentTrainer(whole, disk) as trainer:
        expected = trainer.handle("train", message(tiny))
    for at in range(1, disk.count + 1):
        root = make_home(tmp_path / str(at) / "ada", tiny)
        survivor = crash(root, Appending(root, at, way), tiny)
        with ResidentTrainer(survivor) as trainer:
            assert trainer.handle("train", message(tiny)) == expected
        sent = {(e.kind, e.round, e.sha256) for e in read(survivor / home.OUTGOING)}
        assert ("train", 1, digest_of(expected)) in sent
        shutil.rmtree(tmp_path / str(at))


def crash(root: Path, disk: Faulty, config: Config) -> Path:
    """Ask until the fault; where the next start finds itself."""
    try:
        with ResidentTrainer(root, disk) as trainer:
            trainer.handle("train", message(config))
    except Crash:
        return disk.survivor
    except StorageError:
        assert disk.way == "full"
    except TrainerError as error:
        assert disk.way == "full" and str(error) == "the participant's disk cannot be used"
    return root


# What it refuses


def refused(trainer: ResidentTrainer, body: bytes, verb: str = "train") -> str:
    with pytest.raises(TrainerError) as caught:
        trainer.handle(verb, body)
    return str(caught.value)


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


# Dry runs


def test_a_dry_run_tells_what_would_be_sent_and_leaves_nothing(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    told = json.loads(trainer.handle("dry-run", message(tiny)))
    own = json.loads(trainer.handle("dry-run", b""))
    assert not (folder / home.OUTBOX).exists() and entries(folder) == []
    answer = trainer.handle("train", message(tiny))
    assert (told["bytes"], told["sha256"]) == (len(answer), digest_of(answer))
    assert told["refusal"] == "" and own["bytes"] == told["bytes"]
    assert [part["name"] for part in told["contents"]] == list(unpack_update(answer)[0].tensors)
    (entry,) = read(folder / home.OUTGOING)
    assert told["about"] == entry.about


def test_a_dry_run_names_what_the_policy_would_refuse(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    set_policy(folder, data=["rows.jsonl"], least_cohort=9)
    assert "3 participants" in json.loads(trainer.handle("dry-run", message(tiny)))["refusal"]
    assert json.loads(trainer.handle("dry-run", b""))["refusal"] == ""  # it names no real cohort
    set_policy(folder, data=["rows.jsonl"], most_upload_mb=1e-6)
    assert "MB of answers" in json.loads(trainer.handle("dry-run", b""))["refusal"]


# Several at once


def test_status_answers_during_work_and_stopping_ends_it(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    at_work, go_on = threading.Event(), threading.Event()
    progress = trainer._place.progress

    def slowly(steps: int) -> None:
        at_work.set()
        go_on.wait(30)
        progress(steps)

    trainer._place.progress = slowly
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            trainer.handle("train", message(tiny))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert at_work.wait(30)
    working = status(trainer)["working"]
    assert (working["verb"], working["round"]) == ("train", 1)
    trainer.stop()
    go_on.set()
    thread.join(30)
    assert isinstance(caught[0], Stopping) and entries(folder) == []
    assert status(trainer)["working"] is None


def test_who_has_gone_is_not_worked_for(
    trainer: ResidentTrainer, folder: Path, tiny: Config
) -> None:
    with pytest.raises(TrainerError, match="has gone"):
        trainer.handle("train", message(tiny), lambda: False)
    assert entries(folder) == [] and not (folder / home.OUTBOX).exists()


def test_over_its_socket(trainer: ResidentTrainer, folder: Path, tiny: Config) -> None:
    with (
        TrainerSocket(folder / home.SOCKET, trainer.handle),
        TrainerLink(folder / home.SOCKET, patience=5) as link,
    ):
        answer = link.call("train", message(tiny))
        with pytest.raises(TrainerError, match="approved is"):
            link.call("train", message(tiny, run="ffff"))
        assert json.loads(link.call("status"))["run"] == RUN
    assert entries(folder)[0] == ("train", 1, len(answer), False)


# Real processes


def start(folder: Path) -> subprocess.Popen[str]:
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "meadow.client.resident_trainer", "--folder", str(folder)]
    return subprocess.Popen(
        [*command, "--ready", str(ready)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_a_killed_process_is_replaced_while_its_caller_waits(folder: Path, tiny: Config) -> None:
    """The link outlives two kills, one at work, and gets the bytes of an undisturbed trainer."""
    whole = make_home(folder.with_name("whole"), tiny)
    with ResidentTrainer(whole) as undisturbed:
        expected = undisturbed.handle("train", message(tiny))
    answers: list[bytes] = []
    with TrainerLink(folder / home.SOCKET, patience=120) as link:
        thread = threading.Thread(target=lambda: answers.append(link.call("train", message(tiny))))
        thread.start()  # before there is any trainer
        for _ in range(2):
            process = start(folder)
            while not (folder / "ready").exists() and process.poll() is None:
                thread.join(0.05)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = start(folder)
        thread.join(120)
        assert answers == [expected]
        assert link.call("train", message(tiny)) == expected
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert verify(folder / home.OUTGOING) >= 2
    assert {e.sha256 for e in read(folder / home.OUTGOING)} == {digest_of(expected)}


@pytest.mark.long
def test_a_users_mistake_ends_with_one_line(folder: Path) -> None:
    folder.chmod(0o755)
    process = start(folder)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and told.count("\n") == 1 and "chmod 700" in told


@pytest.mark.long
def test_the_socket_and_what_it_writes_are_the_owners_alone(folder: Path, tiny: Config) -> None:
    process = start(folder)
    with TrainerLink(folder / home.SOCKET, patience=120) as link:
        link.call("train", message(tiny))
    open_to_others = [p for p in folder.rglob("*") if p.stat().st_mode & 0o022]
    socket = (folder / home.SOCKET).stat().st_mode & 0o777
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert socket == 0o600 and open_to_others == []
