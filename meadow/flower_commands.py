"""Flower's own programs, as meadow runs them: found beside this Python, with nothing that phones
home, and with the one bundle that travels.

The bundle holds no code.  It names modules that every participant installed for itself, so that
its bytes are the same wherever this version of meadow builds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import ConfigError, FlowerError
from .store import Disk

POLL_SECONDS = 0.1
"""How often Flower's executors ask for work; on their own machine alone."""

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL_SECONDS),
}
_LICENSE = "Entry points only; the code is what each machine has installed.\n"
_PROJECT_FORM = """\
[project]
name = "{name}"
version = "1.0.0"
description = "{description}"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "{publisher}"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
"""


def project_text(name: str, description: str, publisher: str, server: str, client: str) -> str:
    """The pyproject.toml of a Flower app; its settings are what is appended."""
    return _PROJECT_FORM.format(
        name=name, description=description, publisher=publisher, server=server, client=client
    )


_PROJECT = project_text(
    "meadow-run", "Entry points only", "meadow", "meadow.server.app:app", "meadow.client.app:app"
)


def program(name: str) -> str:
    """The path of one of Flower's programs.  Raises ConfigError where it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed", "pip install 'flwr>=1.41,<1.42'")
    return found


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs run with: their home in `home`, their scripts on the path."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {**_QUIET, "FLWR_HOME": str(home), "PATH": path}


def run(
    arguments: Sequence[str], variables: Mapping[str, str], folder: Path, seconds: float = 60.0
) -> dict[str, Any]:
    """What `flwr ARGUMENTS --format json` answers.  Raises FlowerError with Flower's reason."""
    command = [program("flwr"), *arguments, "--format", "json"]
    found = _called(command, variables, folder, seconds)
    start = found.find("{")
    try:
        answer = json.loads(found[start:]) if start >= 0 else {}
    except ValueError:
        answer = {}
    if not answer.get("success"):
        reason = answer.get("error-message") or found or "no answer"
        raise FlowerError(f"flwr {arguments[0]}: {' '.join(str(reason).split())[-300:]}")
    return dict(answer)


def write_project(folder: Path, disk: Disk) -> Path:
    """The folder that `flwr run` and `flwr build` take: two files, no code."""
    project = folder / "bundle"
    disk.folder(project)
    disk.write(project / "pyproject.toml", _PROJECT.encode())
    disk.write(project / "LICENSE", _LICENSE.encode())
    return project


def bundle_in(folder: Path, disk: Disk) -> Path:
    """The bundle's file, built once in `folder` by each version of the tools and of what it holds.

    Raises FlowerError.
    """
    recipe = "\0".join([_PROJECT, _LICENSE, version("flwr")])
    target = folder / f"bundle-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.fab"
    if not target.exists():
        _build(folder, target, disk)
    return target


def _build(folder: Path, target: Path, disk: Disk) -> None:
    project = write_project(folder, disk)
    output = folder / "building"
    shutil.rmtree(output, ignore_errors=True)
    disk.folder(output)
    command = [program("flwr"), "build", "--app", str(project)]
    _called(command, environment(folder / "flwr"), output, 60.0)
    built = list(output.glob("*.fab"))
    if len(built) != 1:
        raise FlowerError("flwr build made no bundle", "install flwr anew: pip install meadow-fl")
    disk.write(target, built[0].read_bytes())
    shutil.rmtree(output)


def bundle_digest(bundle: Path) -> str:
    """SHA-256, in hexadecimal, as Flower names a bundle."""
    return hashlib.sha256(bundle.read_bytes()).hexdigest()


def _called(
    command: Sequence[str], variables: Mapping[str, str], folder: Path, seconds: float
) -> str:
    try:
        done = subprocess.run(
            list(command),
            cwd=folder,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FlowerError(f"{Path(command[0]).name} gave no answer in {seconds:g} s") from error
    if done.returncode and not done.stdout.strip():
        raise FlowerError(f"{Path(command[0]).name}: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
