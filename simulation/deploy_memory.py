"""Peak memory of a coordinator's processes in a round of few or many large contributions.

Everything is as in a deployment, TLS, enrolment, gateway, SuperLink, server app, journal, but for
the participants: those are one load generator.  What is measured is the sum of the peaks of
meadow's own processes, whether or not they fall together; Flower's are told apart.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..errors import DeploymentError, StorageError
from ..server.coordinator_home import CoordinatorHome
from .deploy_demo import Process, processes_in
from .deploy_trial import Trial, trial
from .process_peaks import ProcessPeaks, pid_in, pids_in

OWN = ("supervisor", "gateway", "server_app")
ENGINE = ("superlink", "superexec")
AT_ONCE = 4
"""Participants that transfer something large at a time: the same few, however many there are."""
RANK, HIDDEN = 64, 512
_MATRICES = 7  # of a llama's layer
_MB = 1_000_000


@dataclass(frozen=True)
class Load:
    """One round of so many contributions of about so many bytes."""

    contributions: int
    megabytes: float

    @property
    def layers(self) -> int:
        """Of a model whose LoRA update has that size."""
        one = _MATRICES * 2 * HIDDEN * RANK * 4
        return max(1, round(self.megabytes * _MB / one))

    @property
    def disk_bytes(self) -> float:
        """What the round leaves behind at its height: the journal's copy, and the SuperLink's
        messages in both directions with what its database has not given back."""
        return 4 * self.contributions * self.megabytes * _MB + 1e9

    def config(self, base: Path) -> Config:
        return Config().replace(
            model={"base": str(base), "device": "cpu", "rank": RANK, "alpha": float(RANK)},
            strategy={"name": "fedavg_lora"},
            rounds={"count": 1, "deadline_seconds": 7000.0},
            clients={"steps": 1},
            simulation={"threads": 1},
        )


@dataclass(frozen=True)
class Peaks:
    """Bytes."""

    update: int
    """Of one contribution as it was sent."""
    contributions: int
    by_process: dict[str, int]

    @property
    def own(self) -> int:
        return sum(self.by_process[name] for name in OWN)

    @property
    def engine(self) -> int:
        return sum(self.by_process[name] for name in ENGINE)


def measure(load: Load, phase: Callable[[str], None]) -> Peaks:
    """Run the round.  Raises StorageError where the disk has no room for it, DeploymentError where
    it did not come to its end."""
    _require_space(load)
    with tempfile.TemporaryDirectory(prefix="meadow-") as name:
        folder = Path(name).resolve()
        phase(f"{load.contributions} contributions of {load.megabytes:g} MB: the model")
        write_base(folder / "base", load.layers)
        peaks = _round(load, folder, phase)
        left = processes_in(folder)
        if left:
            raise DeploymentError(f"processes were left behind: {', '.join(left)}")
    return peaks


def write_base(folder: Path, layers: int) -> None:
    """A random llama, as a coordinator needs it: no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)


def _round(load: Load, folder: Path, phase: Callable[[str], None]) -> Peaks:
    names = [f"participant-{number:03d}" for number in range(load.contributions)]
    with trial(load.config(folder / "base"), names, folder / "run") as run:
        phase(f"{load.contributions} contributions of {load.megabytes:g} MB: the round")
        coordinator, invitations = run.coordinator(load.contributions)
        home = CoordinatorHome(run.stage.coordinator)
        with ProcessPeaks(lambda: _pids(coordinator, home)) as peaks:
            generator = run.start(_generator(run, folder, invitations))
            run.until(coordinator.ended)
            generator.stop()
        return found(home, peaks.peaks())


def found(home: CoordinatorHome, by_process: dict[str, int]) -> Peaks:
    """What a finished round has come to.  DeploymentError where something was not measured."""
    rows = (home.run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(row) for row in rows]
    sizes = [event["bytes"] for event in events if event["kind"] == "contribution"]
    missing = [name for name in (*OWN, *ENGINE) if not by_process.get(name)]
    if missing or not sizes:
        raise DeploymentError(f"nothing was measured of {', '.join(missing) or 'a contribution'}")
    return Peaks(max(sizes), len(sizes), by_process)


def _pids(coordinator: Process, home: CoordinatorHome) -> dict[str, int]:
    pids = pids_in(home.logs / "processes.json")
    if server_app := pid_in(home.server_app):
        pids["server_app"] = server_app
    if coordinator.process is not None:
        pids["supervisor"] = coordinator.process.pid
    return pids


def _generator(run: Trial, folder: Path, invitations: list[str]) -> Process:
    file = folder / "invitations.json"
    file.write_text(json.dumps(invitations), encoding="utf-8")
    arguments = ["--invitations", str(file), "--at-once", str(AT_ONCE)]
    return Process("generator", arguments, folder, module="meadow.simulation.load_generator")


def _require_space(load: Load) -> None:
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if free < load.disk_bytes:
        raise StorageError(
            f"{load.contributions} contributions of {load.megabytes:g} MB need"
            f" {load.disk_bytes / 1e9:.0f} GB in {place}, which has {free / 1e9:.0f} GB",
            "set TMPDIR to a folder with more",
        )
