"""The operator's daemon over programs that are played: what runs, what is told, when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from enrolment import approved, enrolled, new_identity
from gateways import Quick
from homes import blueprint
from played_flower import PlayedFlower

from meadow.config import Config
from meadow.errors import ConfigError, FormatError, IdentityError, MeadowError, StorageError
from meadow.events import Event, EventLog
from meadow.processes import Program, free_port
from meadow.server import coordinator_daemon as module
from meadow.server.authority import Authority
from meadow.server.coordinator_daemon import (
    CoordinatorDaemon,
    NoteTail,
    check_settings,
    not_invited,
    public_addresses,
)
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.flower_engine import FlowerEngine
from meadow.server.roster import Roster
from meadow.server.run_beginning import begin
from meadow.store import locked

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def config(tiny: Config) -> Config:
    return tiny.replace(coordinator={"listen": f"127.0.0.1:{free_port()}"})


@pytest.fixture
def home(config: Config, tmp_path: Path) -> CoordinatorHome:
    home = CoordinatorHome(tmp_path / "c")
    begin(home, config, blueprint(config.model.base), "bb" * 32, new_identity(), Quick())
    return home


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayedFlower:
    """Flower's tool is a script, and its servers sleep."""
    for name in ("superlink", "superexec"):
        program = Program(name, lambda: SLEEP)
        monkeypatch.setattr(FlowerEngine, name, lambda *a, program=program: program)
    gateway = Program("gateway", lambda: SLEEP)
    monkeypatch.setattr(CoordinatorDaemon, "_gateway", lambda self: gateway)
    return PlayedFlower(tmp_path, monkeypatch)


@contextmanager
def running(daemon: CoordinatorDaemon) -> Iterator[dict[str, bool]]:
    """The daemon in a thread; whether the run was finished is known afterwards."""
    stop, said = threading.Event(), dict[str, bool]()
    thread = threading.Thread(target=lambda: said.update(finished=daemon.run(stop.is_set)))
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join()


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(home: CoordinatorHome) -> dict[str, int]:
    record = home.logs / "processes.json"
    return dict(json.loads(record.read_text())) if record.exists() else {}


def runs(flower: PlayedFlower) -> list[str]:
    return [call[0] for call in flower.asked if call[0] in ("run", "stop")]


def test_everything_is_kept_alive_until_somebody_stops_it(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    told: list[Event] = []
    with running(CoordinatorDaemon(home, config, told.append)) as said:
        eventually(lambda: pids(home).keys() == {"superlink", "superexec", "gateway"})
        before = pids(home)["gateway"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: pids(home).get("gateway", before) != before)
    assert said == {"finished": False} and pids(home) == {}
    assert "gateway ended (SIGKILL)" in told[0].data["text"]


def test_it_is_open_once_everything_is_there(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    """Who reads an invitation may use it at once."""
    told: list[set[str]] = []
    daemon = CoordinatorDaemon(home, config, lambda event: None)
    daemon.run(lambda: bool(told), lambda: told.append(set(pids(home))))
    assert told == [{"superlink", "superexec", "gateway"}]


def test_one_flower_run_while_a_server_app_works_and_another_once_it_is_gone(
    home: CoordinatorHome, config: Config, flower: PlayedFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    with ExitStack() as works, running(CoordinatorDaemon(home, config, told.append)):
        eventually(lambda: runs(flower) == ["run"])
        with locked(home.server_app_lock, ""):
            time.sleep(1.0)
            assert runs(flower) == ["run"]
        eventually(lambda: runs(flower) == ["run", "stop", "run"])
        works.enter_context(locked(home.server_app_lock, ""))
    assert [e.data["text"] for e in told if "server app ended" in e.data.get("text", "")] == [
        "the server app ended; it goes on anew"
    ]


def test_a_stale_number_of_a_process_is_taken_for_nobody(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    home.server_app.write_text(str(os.getpid()))  # after a crash or a restore: another's number
    with running(CoordinatorDaemon(home, config, lambda event: None)):
        eventually(lambda: runs(flower) == ["run"])


def test_a_flower_that_refuses_is_told_and_asked_again(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    flower.set_down(True)
    told: list[Event] = []
    with running(CoordinatorDaemon(home, config, told.append)):
        eventually(lambda: any("unavailable" in e.data.get("text", "") for e in told))
        flower.set_down(False)
        eventually(lambda: "run" in runs(flower)[1:])


def test_a_full_disk_does_not_end_it(
    home: CoordinatorHome, config: Config, flower: PlayedFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Flower is to be given cannot be written; once there is room the run goes on."""
    full = [True]
    real = FlowerEngine.start_run

    def start_run(engine: FlowerEngine) -> int:
        if full[0]:
            raise StorageError("cannot write bundle: the disk is full")
        return real(engine)

    monkeypatch.setattr(FlowerEngine, "start_run", start_run)
    told: list[Event] = []
    with running(CoordinatorDaemon(home, config, told.append)) as said:
        eventually(lambda: any("disk is full" in e.data.get("text", "") for e in told))
        full[0] = False
        eventually(lambda: runs(flower) == ["run"])
        assert not said


def test_who_is_decided_about_meanwhile_does_not_end_it(
    home: CoordinatorHome, config: Config, flower: PlayedFlower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes its time to register somebody whom the operator revokes meanwhile."""
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.1)
    invited = config.replace(coordinator={"approve": "invited"})
    real = FlowerEngine.register

    def register(engine: FlowerEngine, key: str, known: Any) -> int:
        if key == ada.flower_key:
            roster.revoke("ada")
        return real(engine, key, known)

    monkeypatch.setattr(FlowerEngine, "register", register)
    told: list[Event] = []
    with Roster.open(home.roster, Quick()) as roster:
        ada = enrolled(roster, "ada")
        enrolled(roster, "bob")
        with running(CoordinatorDaemon(home, invited, told.append)) as said:
            eventually(lambda: roster.by_name("bob").status == "approved")  # type: ignore[union-attr]
            assert not said
        assert roster.by_name("ada").status == "revoked"  # type: ignore[union-attr]
    texts = [event.data.get("text", "") for event in told]
    assert any(text.startswith("ada is not approved: ada is revoked") for text in texts)


def test_a_server_app_that_ends_soon_each_time_is_begun_less_and_less_often(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, begun = [0.0], list[float]()

    def start_run() -> int:
        begun.append(now[0])
        return len(begun)

    engine = SimpleNamespace(start_run=start_run, stop_run=lambda run: None)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    app = module._ServerApp(home, engine, lambda event: None)  # type: ignore[arg-type]
    monkeypatch.setattr(app, "_alive", lambda: bool(begun) and 1 < now[0] - begun[-1] < 4)
    while now[0] < 200:
        app.keep(True)
        now[0] += 0.1
    pauses = [round(later - earlier) for earlier, later in pairwise(begun)]
    assert pauses[0] < 5 and pauses[-1] > 25 and pauses == sorted(pauses)
    monkeypatch.setattr(app, "_alive", lambda: now[0] < begun[-1] + 90)  # until it has lived
    count = len(begun)
    while now[0] < 600:
        app.keep(True)
        now[0] += 0.1
    healthy = [later - earlier for earlier, later in pairwise(begun[count:])]
    assert healthy and all(90 <= pause < 92 for pause in healthy)


def test_it_ends_with_the_run_and_tells_its_events(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    told: list[Event] = []
    daemon = CoordinatorDaemon(home, config, told.append)
    with running(daemon) as said:
        eventually(lambda: "run" in runs(flower))
        log = EventLog(home.run / "events.jsonl")
        log(Event("round_closed", 2, {"loss": 1.5}))
        log.close()
        home.finished.write_text("{}")
        eventually(lambda: said)
    assert said == {"finished": True} and pids(home) == {}
    assert [(event.kind, event.round) for event in told] == [("round_closed", 2)]


def test_a_port_that_is_taken_is_said_at_once(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    port = int(config.coordinator.listen.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ConfigError, match=r"cannot listen at .*in use .choose another \[coord"):
            CoordinatorDaemon(home, config, lambda event: None).run(lambda: False)
    assert flower.asked == [] and pids(home) == {}


def test_where_an_invitation_is_enough_nobody_waits(
    home: CoordinatorHome, config: Config, flower: PlayedFlower
) -> None:
    invited = config.replace(coordinator={"approve": "invited"})
    with Roster.open(home.roster, Quick()) as roster:
        enrolled(roster, "ada")
        with running(CoordinatorDaemon(home, invited, lambda event: None)):
            eventually(lambda: roster.by_name("ada").status == "approved")  # type: ignore[union-attr]
            enrolled(roster, "bob")
            eventually(lambda: roster.by_name("bob").status == "approved")  # type: ignore[union-attr]


# --- what participants do ------------------------------------------------------------------------


@pytest.fixture
def tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Roster, Callable[[], list[str]]]]:
    """A roster, and what the operator is newly told of it."""
    monkeypatch.setattr(module, "NOTES_SECONDS", 0.0)
    told: list[Event] = []
    tail = NoteTail(told.append)

    def new(roster: Roster) -> list[str]:
        told.clear()
        tail.tell(roster)
        return [event.data["text"] for event in told]

    with Roster.open(tmp_path / "roster.db", Quick()) as roster:
        yield roster, lambda: new(roster)


def test_the_operator_hears_of_enrolments_refusals_and_withdrawals(
    tail: tuple[Roster, Callable[[], list[str]]],
) -> None:
    roster, new = tail
    old = approved(roster, "ada")
    roster.note("refusal", old.key, "round 1: long ago")
    waits = enrolled(roster, "bob o'b")
    (text,) = new()
    assert waits.fingerprint in text and """approve 'bob o'"'"'b'`""" in text
    assert new() == []
    eve = enrolled(roster, "eve")
    roster.note("refusal", old.key, "round 3: not at night")
    roster.note("withdraw", old.key, "")
    roster.suspend("ada")
    first, second, third = new()
    assert eve.fingerprint in first
    assert second == "ada refuses, round 3: not at night"
    assert third.startswith("ada withdraws")
    assert new() == []


def test_of_an_empty_roster_there_is_nothing_to_tell(
    tail: tuple[Roster, Callable[[], list[str]]],
) -> None:
    roster, new = tail
    assert new() == []
    enrolled(roster, "ada")
    assert len(new()) == 1


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ["example.org"]},
        {"listen": "0.0.0.0:0"},
        {"listen": "0.0.0.0:x"},
        {"invite": ["../ada"]},
        {"invite": ["a" * 65]},
    ],
)
def test_settings_that_cannot_be_are_said_before_anything_is_made(changes: dict[str, Any]) -> None:
    check_settings(Config())
    with pytest.raises(MeadowError):
        check_settings(Config().replace(coordinator=changes))


def test_an_own_certificate_is_looked_at_before_anything_is_made(tmp_path: Path) -> None:
    one, other = (Authority.open(tmp_path / name, Quick()) for name in ("one", "other"))
    pairs = [authority.issue_server(["example.org"]) for authority in (one, other)]
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    own = Config().replace(coordinator={"certificate": str(certificate), "key": str(key)})
    with pytest.raises(ConfigError, match="there is no .*cert.pem .*certificate names it"):
        check_settings(own)
    certificate.write_bytes(pairs[0][0])
    with pytest.raises(ConfigError, match="there is no .*key.pem"):
        check_settings(own)
    key.write_bytes(pairs[1][1])
    key.chmod(0o600)
    with pytest.raises(IdentityError, match="cannot be used together"):
        check_settings(own)
    key.write_bytes(pairs[0][1])
    check_settings(own)


def test_who_was_invited_once_is_not_invited_again(tmp_path: Path) -> None:
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    config = Config().replace(coordinator={"invite": [decomposed, "ada"]})
    with Roster.open(tmp_path / "roster.db", Quick()) as roster:
        assert not_invited(config, roster) == [composed, "ada"]
        roster.invite(composed, 60.0)
        assert not_invited(config, roster) == ["ada"]


def test_addresses_are_those_of_the_settings_or_this_hosts() -> None:
    config = Config().replace(coordinator={"addresses": ["a.example:1", "b.example:2"]})
    assert public_addresses(config) == ["a.example:1", "b.example:2"]
    own = Config().replace(coordinator={"listen": "127.0.0.1:9440"})
    assert public_addresses(own) == ["127.0.0.1:9440"]
    assert public_addresses(Config()) == [f"{socket.getfqdn()}:9440"]
    with pytest.raises(FormatError, match="'a:b:c' is not an address"):
        check_settings(own.replace(coordinator={"addresses": ["a:b:c"]}))
