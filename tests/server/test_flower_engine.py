"""The SuperLink's surroundings: its files, its port, and nodes that are registered once."""

from __future__ import annotations

import socket
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from enrolment import approved, enrolled, new_flower_key, new_key
from gateways import Quick
from played_flower import PlayedFlower

from meadow.errors import ConfigError, FlowerError, RosterError
from meadow.processes import Program
from meadow.server.authority import Authority
from meadow.server.coordinator_daemon import approve, require_fingerprint
from meadow.server.flower_engine import FlowerEngine
from meadow.server.roster import Roster


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayedFlower:
    return PlayedFlower(tmp_path, monkeypatch)


@pytest.fixture
def engine(tmp_path: Path) -> FlowerEngine:
    return FlowerEngine(tmp_path / "a folder", Quick())


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[Roster]:
    with Roster.open(tmp_path / "roster.db", Quick()) as roster:
        yield roster


def options(program: Program) -> list[str]:
    return list(program.command())


def test_everything_listens_on_this_machine_alone_and_needs_a_secret(
    engine: FlowerEngine, tmp_path: Path
) -> None:
    engine.prepare(Authority.open(tmp_path / "authority", Quick()))
    superlink, superexec = options(engine.superlink()), options(engine.superexec(tmp_path))
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    assert superlink[superlink.index("--isolation") + 1] == "process"
    assert "--enable-supernode-auth" in superlink
    assert "--disable-runtime-dependency-installation" in superlink
    for command in (superlink, superexec):
        secret = Path(command[command.index("--superexec-auth-secret-file") + 1])
        assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 32
        assert "--insecure" not in command
    key = Path(superlink[superlink.index("--ssl-keyfile") + 1])
    assert key.stat().st_mode & 0o777 == 0o600
    environment = engine.superexec(tmp_path).environment
    assert environment["MEADOW_COORDINATOR"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    site = tomllib.loads((tmp_path / "a folder" / "flwr" / "config.toml").read_text())
    address = site["superlink"]["meadow"]["address"]
    assert address == f"127.0.0.1:{engine.port}" and site["superlink"]["default"] == "meadow"
    assert Path(site["superlink"]["meadow"]["root-certificates"]).is_file()


def test_port_and_secret_stay_and_a_port_that_is_taken_does_not(
    engine: FlowerEngine, tmp_path: Path
) -> None:
    authority = Authority.open(tmp_path / "authority", Quick())
    engine.prepare(authority)
    secret = (tmp_path / "a folder" / "secret").read_bytes()
    again = FlowerEngine(tmp_path / "a folder", Quick())
    again.prepare(authority)
    assert again.port == engine.port
    assert (tmp_path / "a folder" / "secret").read_bytes() == secret
    with socket.create_server(("127.0.0.1", engine.port)):
        again.prepare(authority)
        assert again.port != engine.port
        assert FlowerEngine(tmp_path / "a folder", Quick()).port == again.port
        config = (tmp_path / "a folder" / "flwr" / "config.toml").read_text()
        assert f"127.0.0.1:{again.port}" in config


def test_a_node_is_registered_with_the_participants_own_key(
    engine: FlowerEngine, flower: PlayedFlower
) -> None:
    key = new_flower_key()
    assert engine.register(key, set()) == 100
    openssh = load_pem_public_key(key.encode()).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert flower.registered == [openssh.decode()]
    assert flower.asked[0][-3:] == ["meadow", "--format", "json"]


def test_a_key_that_was_registered_just_before_a_crash_is_the_node_that_nobody_has(
    engine: FlowerEngine, flower: PlayedFlower
) -> None:
    one, lost = new_flower_key(), new_flower_key()
    known = {engine.register(one, set())}
    node = engine.register(lost, known)
    assert engine.register(lost, known) == node  # the roster never heard of it
    with pytest.raises(FlowerError, match="already in use"):
        engine.register(lost, known | {node})


def test_a_registration_that_failed_otherwise_is_nobodys_node(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster
) -> None:
    """Somebody was revoked and is somebody else by now; Flower still knows the old node."""
    enrolled(roster, "ada")
    approve(roster, engine, "ada")
    roster.revoke("ada")
    roster.invite("ada", 60.0)
    flower.fail_once("the SuperLink gave no answer")
    with pytest.raises(FlowerError, match="gave no answer"):
        engine.register(new_flower_key(), set())
    enrolled(roster, "bob")
    flower.fail_once("the SuperLink gave no answer")
    with pytest.raises(FlowerError, match="gave no answer"):
        approve(roster, engine, "bob")
    approve(roster, engine, "bob")
    assert roster.nodes() == {100, 101}


def test_after_a_crash_a_node_of_the_past_is_not_in_the_way(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(roster, "ada")
    approve(roster, engine, "ada")
    roster.revoke("ada")
    token = roster.invite("ada", 60.0)
    roster.enrol(token, new_key(), new_flower_key())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(roster, "approve", _killed)
        approve(roster, engine, "ada")
    approve(roster, engine, "ada")
    assert roster.by_name("ada").node_id == 101  # type: ignore[union-attr]


def test_two_who_are_approved_at_once_keep_their_own_keys(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operator in one terminal and in another."""
    real = FlowerEngine._flwr

    def slowly(self: FlowerEngine, *arguments: str) -> dict[str, Any]:
        time.sleep(0.3)
        return real(self, *arguments)

    monkeypatch.setattr(FlowerEngine, "_flwr", slowly)
    people = [enrolled(roster, name) for name in ("ada", "bob")]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda person: approve(roster, engine, person.name), people))
    keys = [load_pem_public_key(person.flower_key.encode()) for person in people]
    written = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in keys]
    nodes = [roster.by_name(person.name).node_id for person in people]  # type: ignore[union-attr]
    assert [flower.registered[node - 100] for node in nodes] == written


def _killed(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_runs_are_started_and_stopped(engine: FlowerEngine, flower: PlayedFlower) -> None:
    assert (engine.start_run(), engine.start_run()) == (1, 2)
    engine.stop_run(1)
    run, _, stop = flower.asked
    assert Path(run[1]).is_dir() and run[0] == "run"
    assert sorted(path.name for path in Path(run[1]).iterdir()) == ["LICENSE", "pyproject.toml"]
    assert stop[:2] == ["stop", "1"]
    flower.set_down(True)
    with pytest.raises(FlowerError, match="flwr run: Connection to the SuperLink is unavailable"):
        engine.start_run()


# --- approval ------------------------------------------------------------------------------------


def test_who_waits_is_approved_with_a_node_of_its_own(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster
) -> None:
    for name in ("ada", "bob"):
        enrolled(roster, name)
        approve(roster, engine, name)
        approve(roster, engine, name)  # twice does no harm, and asks Flower once
    assert [p.node_id for p in roster.participants()] == [100, 101]
    assert [call[:2] for call in flower.asked] == [["supernode", "register"]] * 2


def test_only_who_waits_is_told_to_flower(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster
) -> None:
    roster.invite("ada", 60.0)
    approved(roster, "bob", 1)
    roster.suspend("bob")
    enrolled(roster, "eve")
    roster.revoke("eve")
    for name, status in (("ada", "invited"), ("bob", "suspended"), ("eve", "revoked")):
        with pytest.raises(RosterError, match=f"{name} is {status}"):
            approve(roster, engine, name)
    with pytest.raises(RosterError, match="there is no participant 'max'"):
        approve(roster, engine, "max")
    assert flower.asked == []


def test_without_a_coordinator_nobody_can_be_approved(
    engine: FlowerEngine, flower: PlayedFlower, roster: Roster
) -> None:
    enrolled(roster, "ada")
    with pytest.raises(ConfigError, match="the coordinator is not running .start it"):
        approve(roster, engine, "ada", running=False)
    with pytest.raises(RosterError, match="no participant"):
        approve(roster, engine, "max", running=False)
    assert flower.asked == []


def test_a_fingerprint_is_compared_however_it_was_written(roster: Roster) -> None:
    person = enrolled(roster, "ada")
    for text in (person.fingerprint, person.fingerprint.replace(" ", "").upper()):
        require_fingerprint(roster, "ada", text)
    for name, text in (("ada", person.fingerprint[:-1]), ("ada", "00"), ("max", "00")):
        with pytest.raises(RosterError, match=f"the key of {name} has the fingerprint"):
            require_fingerprint(roster, name, text)
