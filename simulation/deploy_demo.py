"""`meadow demo --deploy`: a coordinator and three participants as real processes on loopback.

Each participant has a home, a key and a folder of text of its own; nothing but the gateway's TLS
port is between them and the coordinator.  The operator's and the participants' commands are the
ones that people use.  In the end the adapter is compared, tensor for tensor, with the local
engine's on the same text.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..client.rows import Row
from ..client.sources import read_rows
from ..config import Config, write
from ..errors import ConfigError, DeploymentError
from ..identity import HOME
from ..nano.corpus import PARTICIPANTS
from ..processes import free_port
from .engine import Result, simulate

NAMES = tuple(sorted(PARTICIPANTS[:3]))
PATIENCE = 900.0  # seconds without which something is wrong

CONFIG = Config().replace(
    model={"device": "cpu"},
    data={"max_length": 128, "train_rows": 64, "held_out_rows": 8},
    rounds={"count": 3, "deadline_seconds": 300.0},
    clients={"steps": 5, "batch": 4},
    simulation={"threads": 1},
)

Phase = Callable[[str], None]


@dataclass
class Process:
    """One command of the demo and what it says."""

    name: str
    arguments: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = "meadow.cli"
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                cwd=self.folder,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def ended(self) -> bool:
        """Whether it is done.  Raises DeploymentError where it failed."""
        assert self.process is not None
        code = self.process.poll()
        if code:
            said = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise DeploymentError(f"{self.name} ended ({code}) and said: {said[-1]}", str(self.log))
        return code == 0

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass(frozen=True)
class Stage:
    """The folders of the demo: the operator's and each participant's."""

    out: Path
    config: Config

    def operator(self, name: str, *arguments: str) -> Process:
        folder = self.out / "operator"
        home = {HOME: str(folder / "home")}
        return Process(name, ["coordinator", *arguments], folder, home)

    def participant(self, who: str, name: str, *arguments: str) -> Process:
        folder = self.out / who
        home = {HOME: str(folder / "home")}
        return Process(name, ["client", *arguments], folder, home)

    @property
    def coordinator(self) -> Path:
        return self.out / "operator" / "coordinator"


def run(out: Path, phase: Phase = lambda text: None) -> dict[str, Any]:
    """The whole demo; its report.

    Raises ConfigError where `out` is not new, DeploymentError where a process failed, one was left
    behind or the adapters differ.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", "name another folder with --out, or delete it")
    began = time.monotonic()
    phase("writing each participant's text")
    address = f"127.0.0.1:{free_port()}"
    coordinator = {"listen": address, "addresses": [address], "invite": list(NAMES)}
    stage = Stage(out.resolve(), CONFIG.replace(coordinator=coordinator))
    rows = _write_text(stage)
    with _stopped(stage) as running:
        _deploy(stage, running, phase)
    left = processes_in(stage.out)
    if left:
        raise DeploymentError(f"processes were left behind: {', '.join(left)}")
    deployed = time.monotonic() - began
    phase("the same in one process, to compare")
    local = _locally(stage, rows)
    return _report(stage, local, deployed, time.monotonic() - began)


def _write_text(stage: Stage) -> Path:
    """Everybody's rows in a folder of their own; and all of them in one file, for the local run."""
    people: dict[str, list[Row]] = {name: [] for name in NAMES}
    for row in read_rows("nano", stage.config.data.chunk):
        if row.client in people:
            people[row.client].append(row)
    for name, rows in people.items():
        (stage.out / name / "home").mkdir(parents=True)
        text = "".join(_line(row, named=False) for row in rows)
        (stage.out / name / "rows.jsonl").write_text(text, encoding="utf-8")
    (stage.out / "operator" / "home").mkdir(parents=True)
    (stage.out / "operator" / "run.toml").write_text(write(stage.config), encoding="utf-8")
    together = stage.out / "everybody.jsonl"
    lines = (_line(row, named=True) for rows in people.values() for row in rows)
    together.write_text("".join(lines), encoding="utf-8")
    return together


def _line(row: Row, named: bool) -> str:
    fields = {"prompt": row.prompt, "response": row.response, "split": row.split}
    return json.dumps({**fields, **({"client": row.client} if named else {})}) + "\n"


def _deploy(stage: Stage, running: list[Process], phase: Phase) -> None:
    """Invite, join, approve, train; until the coordinator has its adapter."""
    coordinator = stage.operator("coordinator", "run.toml")
    running.append(coordinator)
    phase("the operator starts a coordinator, which prints three invitations")
    coordinator.start()
    invitations = _invitations(coordinator)
    phase("the participants join; the operator approves them")
    joining = [
        stage.participant(name, "join", "join", word, "--data", "rows.jsonl", "--yes")
        for name, word in invitations.items()
    ]
    running += joining
    for join in joining:
        join.start()
    for name in invitations:
        _approve(stage, running, name)
    _until(running, lambda: all(join.ended() for join in joining))
    phase("the daemons start, and train")
    daemons = [stage.participant(name, "daemon") for name in NAMES]
    running += daemons
    for daemon in daemons:
        daemon.start()
    _until(running, coordinator.ended)


def _invitations(coordinator: Process) -> dict[str, str]:
    """Name to invitation, as the operator reads them off the terminal."""
    found: dict[str, str] = {}

    def printed() -> bool:
        words = coordinator.log.read_text(errors="replace").split()
        invited = [word for word in words if word.startswith("meadow1:")]
        found.update(zip(NAMES, invited, strict=False))
        return len(found) == len(NAMES)

    _until([coordinator], printed)
    return found


def _approve(stage: Stage, running: list[Process], name: str) -> None:
    """What the operator does once the fingerprint on both sides is the same."""

    def pending() -> bool:
        listing = stage.operator("clients", "clients", "--json", "clients.json")
        running.append(listing)
        listing.start()
        _until([listing], listing.ended)
        people = json.loads((listing.folder / "clients.json").read_text())
        return any(p["name"] == name and p["status"] == "pending" for p in people)

    _until(running, pending)
    approval = stage.operator(f"approve-{name}", "approve", name)
    running.append(approval)
    approval.start()
    _until([approval], approval.ended)


def _until(running: Sequence[Process], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for process in running:
            process.ended()
        if time.monotonic() > deadline:
            raise DeploymentError(f"it did not get there in {PATIENCE:.0f} s", "see the .log files")
        time.sleep(0.2)


@contextmanager
def _stopped(stage: Stage) -> Iterator[list[Process]]:
    """Processes that are asked to stop in the end, the last started first."""
    running: list[Process] = []
    try:
        yield running
    finally:
        for process in reversed(running):
            process.stop()


def processes_in(folder: Path) -> list[str]:
    """Commands of running processes that name something in a folder, but for those above us."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows}
    above = {process := os.getpid()}
    while process := parents.get(process, 0):
        above.add(process)
    return [row[2][:200] for row in rows if str(folder) in row[-1] and int(row[0]) not in above]


def _locally(stage: Stage, rows: Path) -> Result:
    """The local engine: sequential, one thread, the same three participants."""
    config = stage.config.replace(data={"source": str(rows)})
    return simulate(config, stage.out / "local")


def _report(stage: Stage, local: Result, deployed: float, seconds: float) -> dict[str, Any]:
    adapter = stage.coordinator / "run" / "adapter"
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (adapter, local.adapter))
    differing = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    if differing or mine.keys() != theirs.keys():
        raise DeploymentError(
            f"{len(differing)} of {len(theirs)} tensors differ from the local engine's",
            f"{adapter} and {local.adapter}",
        )
    metrics = (stage.coordinator / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in metrics]
    return {
        "participants": list(NAMES),
        "rounds": rows[-1]["round"],
        "base_loss": rows[0]["loss"],
        "loss": rows[-1]["loss"],
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "tensors": len(theirs),
        "equal": True,
        "adapter": str(adapter),
        "seconds_deployed": deployed,
        "seconds": seconds,
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    yield (
        f"{len(report['participants'])} participants, {report['rounds']} rounds: held-out loss"
        f" {report['base_loss']:.4f} -> {report['loss']:.4f}"
    )
    yield f"all {report['tensors']} tensors equal the local engine's, bit for bit"
    yield "every process ended"
    yield f"{report['seconds_deployed']:.0f} s deployed, {report['seconds']:.0f} s in all"
    yield f"adapter: {report['adapter']}"
