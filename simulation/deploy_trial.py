"""One coordinator as a real process on this machine, and what a measurement starts around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config, write
from ..errors import DeploymentError
from ..processes import free_port
from .deploy_demo import Process, Stage

PATIENCE = 7200.0  # seconds without which something is wrong
_PREFIX = "meadow1:"


@dataclass
class Trial:
    """What runs, the last started last."""

    stage: Stage
    running: list[Process] = field(default_factory=list)

    def start(self, process: Process) -> Process:
        self.running.append(process)
        process.start()
        return process

    def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait; DeploymentError where a process fails meanwhile, or it takes too long."""
        deadline = time.monotonic() + patience
        while not condition():
            for process in self.running:
                process.ended()
            if time.monotonic() > deadline:
                raise DeploymentError(f"it did not get there in {patience:.0f} s")
            time.sleep(0.1)

    def coordinator(self, count: int) -> tuple[Process, list[str]]:
        """Start the coordinator; the invitations that it prints, once they can be used."""
        process = self.start(self.stage.operator("coordinator", "run.toml"))
        words: list[str] = []
        ready = self.stage.coordinator / "gateway.port"

        def printed() -> bool:
            said = process.log.read_text(errors="replace").split()
            words[:] = [word for word in said if word.startswith(_PREFIX)]
            return len(words) == count and ready.exists()

        self.until(printed, 600.0)
        return process, words

    def stop(self) -> None:
        for process in reversed(self.running):
            process.stop()


@contextmanager
def trial(config: Config, names: Sequence[str], folder: Path) -> Iterator[Trial]:
    """A coordinator's settings in a new folder, whoever is invited being let in; what the block
    starts is stopped at its end."""
    address = f"127.0.0.1:{free_port()}"
    own = {"listen": address, "addresses": [address], "invite": list(names), "approve": "invited"}
    stage = Stage(folder.resolve(), config.replace(coordinator=own))
    home = stage.out / "operator" / "home"
    home.mkdir(parents=True)
    (home.parent / "run.toml").write_text(write(stage.config), encoding="utf-8")
    found = Trial(stage)
    try:
        yield found
    finally:
        found.stop()
