"""Plain Flower under the same work: its SuperLink, SuperExec and SuperNode, TLS and node keys, with
its own settings, and the app of plain_flower_app.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..client.flower_key import FlowerKey
from ..errors import DeploymentError
from ..flower_commands import environment, program, project_text, run
from ..nano import FOLDER
from ..processes import Program, Supervisor, free_port
from ..server.authority import Authority
from ..server.flower_engine import FlowerEngine
from ..store import Disk
from .deploy_demo import processes_in
from .deploy_overhead import MAX_LENGTH, RATE, config, write_rows

PATIENCE = 1800.0  # seconds without which something is wrong
_OWN_POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # meadow's choice; a user of Flower has its default


@dataclass(frozen=True)
class PlainRound:
    """Seconds."""

    total: float
    work: float
    """The step, with the adapter's weights put in and taken out."""
    loading: float
    """Tokenizer, model and text in the client's process."""

    @property
    def rest(self) -> float:
        """Waiting for polls, starting processes and importing, transfer, aggregation."""
        return self.total - self.work - self.loading


def measure(rounds: int, phase: Callable[[str], None]) -> list[PlainRound]:
    """Rounds 2 to `rounds`.  Raises DeploymentError where they do not end, FlowerError where Flower
    refuses."""
    with tempfile.TemporaryDirectory(prefix="meadow-") as name:
        folder = Path(name).resolve()
        phase("plain Flower: one node registers")
        found = _run(folder, rounds, phase)
        left = processes_in(folder)
        if left:
            raise DeploymentError(f"processes were left behind: {', '.join(left)}")
    return found


def rounds_of(report: Mapping[str, Any]) -> list[PlainRound]:
    """What the server app has written down, but for the first round, which also warms up."""
    ended, metrics = report["ended"], report["metrics"]
    return [
        PlainRound(
            ended[number] - ended[number - 1],
            metrics[str(number)]["work"],
            metrics[str(number)]["loading"],
        )
        for number in range(2, len(ended))
    ]


def write_app(folder: Path, rounds: int, rows: Path, report: Path) -> Path:
    """The app's project, as `flwr run` takes it."""
    settings = {
        "model": str(FOLDER),
        "rows": str(rows),
        "report": str(report),
        "rounds": rounds,
        "rank": config("fedavg_lora", rounds).model.rank,
        "alpha": config("fedavg_lora", rounds).model.alpha,
        "max-length": MAX_LENGTH,
        "rate": RATE,
    }
    project = folder / "project"
    (project / "plain").mkdir(parents=True)
    (project / "plain" / "__init__.py").write_text("", encoding="utf-8")
    found = find_spec("meadow.simulation.plain_flower_app")
    assert found is not None and found.origin is not None
    shutil.copyfile(found.origin, project / "plain" / "app.py")
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    head = project_text(
        "plain", "LoRA with FedAvg", "plain", "plain.app:server", "plain.app:client"
    )
    (project / "pyproject.toml").write_text(f"{head}{lines}\n", encoding="utf-8")
    (project / "LICENSE").write_text("A benchmark's.\n", encoding="utf-8")
    return project


def _run(folder: Path, rounds: int, phase: Callable[[str], None]) -> list[PlainRound]:
    disk, rows, report = Disk(), folder / "rows.jsonl", folder / "report.json"
    write_rows(rows)
    engine = FlowerEngine(folder / "flower", disk)
    engine.prepare(Authority.open(folder / "authority", disk))
    key = FlowerKey.load_or_create(folder / "flower-key", disk)
    programs = [
        _plain(engine.superlink()),
        _plain(engine.superexec(folder)),
        _plain(_supernode(folder, engine)),
    ]
    first = [program.name for program in programs[:2]]
    with Supervisor(folder / "logs", programs, disk=disk) as supervisor:
        supervisor.wait(lambda: supervisor.ready("superexec"), first)
        engine.register(key.public_pem, ())
        app = write_app(folder, rounds, rows, report)
        phase(f"plain Flower: {rounds} rounds of one step")
        run(["run", str(app)], _quiet(engine.environment), folder)
        end = time.monotonic() + PATIENCE
        supervisor.wait(lambda: report.exists() or time.monotonic() > end)
    if not report.exists():
        raise DeploymentError(f"plain Flower's run did not end in {PATIENCE:.0f} s")
    return rounds_of(json.loads(report.read_text(encoding="utf-8")))


def _supernode(folder: Path, engine: FlowerEngine) -> Program:
    command = [
        program("flower-supernode"),
        *("--superlink", f"127.0.0.1:{engine.port}"),
        *("--root-certificates", str(engine.authority_file)),
        *("--auth-supernode-private-key", str(folder / "flower-key")),
        *("--port", str(free_port())),
    ]
    return Program("supernode", lambda: command, environment(folder / "node"))


def _plain(found: Program) -> Program:
    """With Flower's own settings but for what would reach the internet."""
    return replace(found, environment=_quiet(found.environment))


def _quiet(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != _OWN_POLL}
