"""`meadow coordinator …` at an operator's keyboard: the daemon itself has tests of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from enrolment import enrolled, new_flower_key, new_key
from gateways import Quick
from played_flower import PlayedFlower

from meadow.cli import main
from meadow.cli_coordinator import stoppable, with_start
from meadow.config import Config, write
from meadow.identity import HOME
from meadow.invitation import Invitation
from meadow.processes import free_port
from meadow.server.coordinator_daemon import CoordinatorDaemon
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.roster import Roster
from meadow.store import locked

Failure = Callable[..., str]
PRINTED = re.compile(r"meadow client join (meadow1:\S+) --data FOLDER")


@pytest.fixture
def office(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CoordinatorHome]:
    """The operator's folder with a run.toml; Flower is played and the daemon ends at once."""
    office = tmp_path / "office"
    office.mkdir()
    address = f"127.0.0.1:{free_port()}"
    config = tiny.replace(coordinator={"listen": address, "invite": ["ada", "bob"]})
    (office / "run.toml").write_text(write(config))
    monkeypatch.setenv(HOME, str(office / "home"))
    monkeypatch.chdir(office)
    monkeypatch.setattr(CoordinatorDaemon, "run", _stopped)
    PlayedFlower(tmp_path, monkeypatch)
    yield CoordinatorHome(office / "coordinator")


def _stopped(daemon: CoordinatorDaemon, stop: object, opened: Callable[[], None]) -> bool:
    """As a daemon that is asked to stop once it is there."""
    opened()
    return False


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Failure:
    """The one line that a mistaken command prints."""

    def fail(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["coordinator", *map(str, arguments)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("meadow: ")
        return last

    return fail


def do(*arguments: str | Path) -> Any:
    """Run `meadow coordinator`; what it reports."""
    assert main(["coordinator", *map(str, arguments), "--json", "report.json"]) == 0
    return json.loads(Path("report.json").read_text())


@contextmanager
def roster_of(home: CoordinatorHome) -> Iterator[Roster]:
    with Roster.open(home.roster, Quick()) as roster:
        yield roster


def test_a_start_prints_each_invitation_once(
    office: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do("run.toml") == {"finished": False, "folder": str(office.folder)}
    words = PRINTED.findall(capsys.readouterr().out)
    invitations = [Invitation.parse(word) for word in words]
    assert [invitation.name for invitation in invitations] == ["ada", "bob"]
    assert invitations[0].addresses == (office.config().coordinator.listen,)
    assert invitations[0].authority and invitations[0].expires > time.time() + 80_000
    do("start", "run.toml")
    assert PRINTED.findall(capsys.readouterr().out) == []
    with roster_of(office) as roster:
        token = invitations[0].token
        assert roster.enrol(token, new_key(), new_flower_key()).name == "ada"


def test_an_invitation_is_made_anew_by_name(office: CoordinatorHome, failure: Failure) -> None:
    do("run.toml")
    report = do("invite", "max [red]")
    assert Invitation.parse(report["invitation"]).name == report["name"] == "max [red]"
    assert "cannot be a participant's name" in failure("invite", "../max")
    with roster_of(office) as roster:
        person = enrolled(roster, "eve")
        roster.approve("eve", 1)
    assert "eve is enrolled and approved" in failure("invite", "eve")
    assert person.key


def test_with_an_own_certificate_the_systems_trust_is_what_counts(
    office: CoordinatorHome, tmp_path: Path
) -> None:
    own = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    config = Config().replace(coordinator={**own, "addresses": ["meadow.example.org:9440"]})
    do("run.toml")
    office.settings.write_text(write(config))
    assert Invitation.parse(do("invite", "max")["invitation"]).authority == b""


def test_a_finished_run_says_where_its_adapter_is(
    office: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    do("run.toml")
    office.finished.write_text("{}")
    capsys.readouterr()
    assert do("run.toml")["finished"]
    assert str(office.run / "adapter") in capsys.readouterr().out


def test_mistakes_are_one_line(
    office: CoordinatorHome, failure: Failure, tiny: Config, tmp_path: Path
) -> None:
    assert "cannot read nothing.toml" in failure("nothing.toml")
    for command in ("status", "clients", "log", "pause", "resume"):
        assert "is no coordinator's folder" in failure(command)
    assert "is no coordinator's folder" in failure("approve", "ada")
    assert "is no coordinator's folder" in failure("backup", "b.tar")
    assert not office.folder.exists()
    for settings, words in (
        ({"coordinator": {"listen": "nowhere"}}, "is not an address"),
        ({"coordinator": {"invite": ["a/b"]}}, "cannot be a participant's name"),
        ({"model": {"base": "/nowhere/base"}}, "/nowhere/base"),
        ({"simulation": {"engine": "fused"}}, "is for one machine"),
    ):
        Path("bad.toml").write_text(write(tiny.replace(**settings)))
        assert words in failure("bad.toml", "--out", "elsewhere")
    do("run.toml")
    other = tiny.replace(rounds={"count": 77})
    Path("other.toml").write_text(write(other))
    assert "holds a run with other settings" in failure("other.toml")


def test_a_second_coordinator_on_the_folder_is_refused(
    office: CoordinatorHome, failure: Failure
) -> None:
    do("run.toml")
    with locked(office.lock, ""):
        line = failure("run.toml")
    assert str(office.folder) in line and "a coordinator runs there" in line


def test_who_takes_part_is_decided_by_name_and_shown_in_one_line_each(
    office: CoordinatorHome, failure: Failure, capsys: pytest.CaptureFixture[str]
) -> None:
    do("run.toml")
    with roster_of(office) as roster:
        person = enrolled(roster, "eve")
    capsys.readouterr()
    people = do("clients")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("eve")]
    assert person.fingerprint in line and "pending" in line
    assert {p["name"]: p["status"] for p in people} == {
        "ada": "invited", "bob": "invited", "eve": "pending"
    }  # fmt: skip
    assert "not running (start it" in failure("approve", "eve")
    with locked(office.lock, ""):
        assert "not ab12" in failure("approve", "eve", "--fingerprint", "ab12")
        found = do("approve", "eve", "--fingerprint", person.fingerprint)
    assert found == {"name": "eve", "status": "approved"}
    assert do("suspend", "eve")["status"] == "suspended"
    assert do("readmit", "eve")["status"] == "approved"
    assert do("revoke", "eve")["status"] == "revoked"
    assert "eve is revoked" in failure("readmit", "eve")
    assert "no participant 'max'" in failure("suspend", "max")
    kinds = [note["kind"] for note in do("log")]
    assert kinds == ["invited", "invited", "invited", "enrolled", "approved", "suspended",
                     "resumed", "revoked"]  # fmt: skip
    assert len(do("log", "--last", "2")) == 2


def test_status_says_what_an_operator_asks(
    office: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    do("run.toml")
    capsys.readouterr()
    assert do("status")["running"] is False
    assert "not running" in capsys.readouterr().out
    do("pause")
    with roster_of(office) as roster:
        person = enrolled(roster, "eve")
        roster.note("withdraw", person.key, "")
        roster.note("refusal", person.key, "round 2: [bold]not at night")
    rows = '{"round":0,"loss":3.25}\n{"round":1,"loss":2.5}\n'
    (office.run / "metrics.jsonl").write_text(rows)
    capsys.readouterr()
    with locked(office.lock, ""):
        do("status")
    printed = capsys.readouterr().out
    losses = "round 1 of 2 is closed; held-out loss 3.2500 at first, 2.5000 now"
    asked = ("eve: withdraw", "eve: refusal round 2: [bold]not at night")
    for words in ("running, paused", losses, *asked, "pending"):
        assert words in printed


def test_pause_and_resume(office: CoordinatorHome) -> None:
    do("run.toml")
    for _ in range(2):
        assert do("pause") == {"paused": True} and office.paused.exists()
    for _ in range(2):
        assert do("resume") == {"paused": False} and not office.paused.exists()


def test_a_restored_coordinator_is_the_same_one_on_another_machine(
    office: CoordinatorHome, failure: Failure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    do("run.toml")
    terms, key = office.terms.read_bytes(), office.identity().key_id
    do("backup", "b.tar")
    assert Path("b.tar").stat().st_mode & 0o777 == 0o600
    assert "lies in the folder" in failure("backup", "coordinator/b.tar")
    assert "is not empty" in failure("restore", "b.tar")
    monkeypatch.setenv(HOME, str(tmp_path / "another user"))
    do("restore", "b.tar", "--folder", "moved")
    moved = CoordinatorHome(office.folder.with_name("moved"))
    do("moved/run.toml", "--out", "moved")
    assert moved.terms.read_bytes() == terms and moved.identity().key_id == key
    Path("cut.tar").write_bytes(Path("b.tar").read_bytes()[:5000])
    assert "is cut off" in failure("restore", "cut.tar", "--folder", "third")
    assert not Path("third").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("coordinator run.toml", "coordinator start run.toml"),
        ("coordinator --out x run.toml", "coordinator start --out x run.toml"),
        ("coordinator start run.toml", "coordinator start run.toml"),
        ("coordinator invite x.toml", "coordinator invite x.toml"),
        ("coordinator", "coordinator"),
        ("coordinator --help", "coordinator --help"),
        ("simulate run.toml", "simulate run.toml"),
    ],
)
def test_without_a_verb_a_run_toml_is_started(given: str, meant: str) -> None:
    assert with_start(given.split()) == meant.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asking_to_stop_is_heard_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number)
    with stoppable() as stopped:
        assert not stopped
        os.kill(os.getpid(), number)
        assert stopped == [number]
    assert signal.getsignal(number) is before


def test_an_invitation_in_a_file_is_for_its_owner_alone(office: CoordinatorHome) -> None:
    assert main(["coordinator", "run.toml"]) == 0
    file = Path("word.json")
    file.touch(0o644)
    assert main(["coordinator", "invite", "eve", "--json", str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert Invitation.parse(json.loads(file.read_text())["invitation"]).name == "eve"


def test_the_operator_withdraws_for_who_cannot_ask_any_more(
    office: CoordinatorHome, failure: Failure, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coordinator", "run.toml"]) == 0
    assert "eve has not enrolled" in failure("withdraw", "eve")
    with Roster.open(office.roster, Quick()) as roster:
        enrolled(roster, "eve")
        capsys.readouterr()
        with locked(office.server_app_lock, ""):  # it works on the run, and reads its inbox
            assert main(["coordinator", "withdraw", "eve"]) == 0
        assert roster.by_name("eve").status == "pending"  # type: ignore[union-attr]
        assert "before a round is combined" in capsys.readouterr().out
        assert main(["coordinator", "withdraw", "eve"]) == 0
        assert roster.by_name("eve").status == "revoked"  # type: ignore[union-attr]
        assert "eve withdrew; its contributions are deleted" in capsys.readouterr().out


def test_what_an_operator_asks_with_loads_no_torch() -> None:
    """A decision or a look at the run takes no two seconds."""
    code = (
        "import sys, meadow.cli, meadow.server.coordinator_daemon as _, meadow.server.roster as _,"
        " meadow.server.coordinator_status as _, meadow.server.coordinator_backup as _;"
        "print([m for m in ('torch', 'transformers', 'peft', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
