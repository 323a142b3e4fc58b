"""The unit of a participant's daemon passes systemd's own check and says what was asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meadow.client.systemd_unit import Fence, readable_paths, unit_text
from meadow.errors import ConfigError

FOLDER, HOME = Path("/var/lib/meadow/clients/ada"), Path("/var/lib/meadow")


def settings(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_it_runs_the_daemon_and_may_write_its_own_folder_only() -> None:
    said = settings(unit_text("ada", FOLDER, HOME, Fence("meadow"), "/opt/venv/bin/python"))
    assert said["ExecStart"] == [f"/opt/venv/bin/python -m meadow.cli client run --folder {FOLDER}"]
    assert said["ReadWritePaths"] == [str(FOLDER)] and said["ProtectSystem"] == ["strict"]
    assert said["User"] == ["meadow"] and said["PrivateDevices"] == ["yes"]
    assert said["ProtectHome"] == ["yes"] and "MemoryMax" not in said and "CPUQuota" not in said


def test_limits_text_and_gpu_are_said() -> None:
    text = Path("/home/ada/letters")
    fence = Fence("ada", (text,), memory_mb=4000, cpus=1.5, gpu=True)
    said = settings(unit_text("ada", FOLDER, HOME, fence))
    assert said["MemoryMax"] == ["4000M"] and said["CPUQuota"] == ["150%"]
    assert said["ReadOnlyPaths"] == [str(text)] and said["PrivateDevices"] == ["no"]
    assert said["ReadWritePaths"] == [f"{FOLDER} {HOME}"]  # where the lock of a GPU is
    assert said["ProtectHome"] == ["read-only"]  # or it could not read the text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/root", "read-only"),
        ("/run/user/1000/letters", "read-only"),
        ("/run/users", "yes"),
        ("/homes/ada", "yes"),
        ("/srv/home/ada", "yes"),
    ],
)
def test_homes_stay_hidden_unless_something_in_them_is_used(text: str, expected: str) -> None:
    fence = Fence("ada", (Path(text),))
    said = settings(unit_text("ada", FOLDER, HOME, fence, "/opt/venv/bin/python"))
    assert said["ProtectHome"] == [expected]


@pytest.mark.parametrize("name", ["", "ada\nExecStart=/bin/sh", "100%", 'a"b'])
def test_nothing_can_be_smuggled_into_it(name: str) -> None:
    with pytest.raises(ConfigError):
        unit_text(name, FOLDER, HOME, Fence("meadow"))
    with pytest.raises(ConfigError):
        unit_text("ada", FOLDER, HOME, Fence(name))


def test_paths_with_spaces_are_refused() -> None:
    with pytest.raises(ConfigError, match="spaces"):
        unit_text("ada", Path("/var/lib/my meadow"), HOME, Fence("meadow"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    fence = Fence("root", (tmp_path,), memory_mb=4000, cpus=1.5)
    unit = tmp_path / "meadow-client.service"
    unit.write_text(unit_text("ada", FOLDER, HOME, fence, sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert str(unit) not in found.stderr, found.stderr


def test_what_has_to_be_readable_follows_from_sources(tmp_path: Path) -> None:
    (tmp_path / "[odd] name").mkdir()
    sources = ["nano", "datasets:some/name", f"datasets:{tmp_path}", f"{tmp_path}/a/**/*.jsonl"]
    assert readable_paths(sources) == (tmp_path, tmp_path / "a")
    assert readable_paths([str(tmp_path / "[odd] name"), ""]) == (tmp_path / "[odd] name",)
