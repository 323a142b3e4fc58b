"""Flower's programs as meadow runs them: what they answer, and the one bundle that travels."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from meadow import flower_commands
from meadow.errors import ConfigError, FlowerError
from meadow.flower_commands import bundle_digest, bundle_in, environment, program, run
from meadow.store import Disk


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `flwr` that does what a test writes into it."""
    script = tmp_path / "flwr"
    monkeypatch.setattr(flower_commands, "program", lambda name: str(script))
    return script


def play(script: Path, body: str) -> None:
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o700)


def asked(folder: Path, seconds: float = 30.0) -> dict[str, object]:
    return run(["supernode", "list"], environment(folder / "home"), folder, seconds)


def test_the_answer_is_read_behind_what_is_said_before_it(flwr: Path, tmp_path: Path) -> None:
    play(flwr, """echo 'Loading...'; echo '{"success": true, "node-id": "7"}'""")
    assert asked(tmp_path) == {"success": True, "node-id": "7"}


def test_nothing_phones_home_and_the_home_is_ours(flwr: Path, tmp_path: Path) -> None:
    play(
        flwr,
        'echo "{\\"success\\": true, \\"home\\": \\"$FLWR_HOME\\",'
        ' \\"telemetry\\": \\"$FLWR_TELEMETRY_ENABLED\\",'
        ' \\"update\\": \\"$FLWR_DISABLE_UPDATE_CHECK\\", \\"arguments\\": \\"$*\\"}"',
    )
    found = asked(tmp_path)
    assert found["home"] == str(tmp_path / "home")
    assert (found["telemetry"], found["update"]) == ("0", "1")
    assert found["arguments"] == "supernode list --format json"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("""echo '{"success": false, "error-message": "no such node"}'; exit 1""", "no such node"),
        ("echo 'it broke'", "it broke"),
        ("echo '{'", "{"),
        ("exit 0", "no answer"),
        ("echo 'cannot connect' >&2; exit 3", "cannot connect"),
    ],
)
def test_a_failure_is_one_line_with_flowers_reason(
    flwr: Path, tmp_path: Path, body: str, reason: str
) -> None:
    play(flwr, body)
    with pytest.raises(FlowerError) as raised:
        asked(tmp_path)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_program_that_hangs_is_given_up(flwr: Path, tmp_path: Path) -> None:
    play(flwr, "exec sleep 60")
    with pytest.raises(FlowerError, match=r"flwr gave no answer in 0.3 s"):
        asked(tmp_path, 0.3)


def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="flower-nothing is not installed.*pip install"):
        program("flower-nothing")
    assert Path(program("flwr")).is_file()


@pytest.mark.long
def test_the_bundle_is_the_same_wherever_it_is_built_and_holds_no_code(tmp_path: Path) -> None:
    """With the real `flwr build`: a participant compares its own bundle with the coordinator's."""
    built = []
    for name in ("here", "a place with spaces"):
        (tmp_path / name).mkdir()
        built.append(bundle_in(tmp_path / name, Disk()))
    one, other = (path.read_bytes() for path in built)
    assert one == other and bundle_digest(built[0]) == bundle_digest(built[1])
    with zipfile.ZipFile(built[0]) as bundle:
        names = [name for name in bundle.namelist() if not name.startswith(".info/")]
        contents = {name: bundle.read(name).decode() for name in bundle.namelist()}
    assert sorted(names) == ["LICENSE", "pyproject.toml"]
    assert not any(name.endswith((".py", ".pyc", ".so", ".sh")) for name in contents)
    assert 'serverapp = "meadow.server.app:app"' in contents["pyproject.toml"]
    assert 'clientapp = "meadow.client.app:app"' in contents["pyproject.toml"]


def test_it_is_built_once_by_each_version(
    flwr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(flwr, f"echo built >> {tmp_path}/log; echo bundle > meadow.fab")
    first = bundle_in(tmp_path, Disk())
    assert bundle_in(tmp_path, Disk()) == first and first.read_text() == "bundle\n"
    assert (tmp_path / "log").read_text() == "built\n"
    monkeypatch.setattr(flower_commands, "version", lambda name: "1.42.0")
    assert bundle_in(tmp_path, Disk()) != first
    assert (tmp_path / "log").read_text() == "built\nbuilt\n"


@pytest.mark.parametrize("body", ["true", "echo a > a.fab; echo b > b.fab"])
def test_a_build_that_makes_no_one_bundle_is_a_failure(
    flwr: Path, tmp_path: Path, body: str
) -> None:
    play(flwr, body)
    with pytest.raises(FlowerError, match="made no bundle"):
        bundle_in(tmp_path, Disk())
