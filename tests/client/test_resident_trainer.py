"""The resident trainer: its bytes are the local engine's, and it keeps what it has sent."""

from __future__ import annotations

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
from homes import NAMES, RUN, make_home, message, set_policy
from trainers import entries, status

from meadow.client import home
from meadow.client.outbox import Outbox
from meadow.client.outgoing_log import read, verify
from meadow.client.resident_trainer import ResidentTrainer
from meadow.client.trainer_link import TrainerLink
from meadow.client.trainer_socket import TrainerSocket
from meadow.client.work_limits import Stopping
from meadow.config import Config
from meadow.errors import StorageError, TrainerError
from meadow.journal import Journal, RunIdentity
from meadow.server.coordinator import Coordinator, Refusal
from meadow.simulation.engine import Lab, simulate
from meadow.store import digest_of
from meadow.strategies.messages import pack_update, unpack_update
from meadow.strategies.transforms import make_transforms


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
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
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
