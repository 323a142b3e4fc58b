"""One user of `meadow peer`: a home, a folder, a run.toml, and what they type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import write_rows
from tiny_peers import eventually

from meadow.cli import main
from meadow.client.peer_tls import certificate_of
from meadow.config import Config, load, write
from meadow.identity import HOME, Identity


class Person:
    """One user: a home, a folder, a run.toml."""

    def __init__(self, folder: Path, base: Path, **peer: Any) -> None:
        folder.mkdir()
        self.folder, self.config = folder, folder / "run.toml"
        write_rows(folder / "rows.jsonl")
        config = Config().replace(
            model={"base": str(base), "rank": 4, "alpha": 4.0, "device": "cpu"},
            data={"source": "rows.jsonl", "max_length": 32},
            strategy={"name": "fedkseed", "options": {"scale": -6}},
            clients={"batch": 2},
            simulation={"threads": 1},
            peer={"steps": 2, "lr": 1e-3, "sync_seconds": 0.05, **peer},
        )
        self.config.write_text(write(config))

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    @property
    def identity(self) -> Identity:
        return Identity.load_or_create(self.folder / "home" / "identity.pem")

    @contextmanager
    def here(self) -> Iterator[None]:
        """At this user's keyboard."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(HOME, str(self.folder / "home"))
            patch.chdir(self.folder)
            yield

    def do(self, *arguments: str | Path) -> dict[str, Any]:
        """Run `meadow peer` with these arguments; what it reports."""
        with self.here():
            assert main(["peer", *map(str, arguments), "--json", "report.json"]) == 0
            report: dict[str, Any] = json.loads(Path("report.json").read_text())
        return report

    def work(self, out: str = "peer") -> dict[str, Any]:
        """`meadow peer run` until its records are made, then Ctrl-C."""
        log = self.folder / out / "events.jsonl"
        done = threading.Event()

        def interrupt() -> None:
            eventually(lambda: done.is_set() or log.exists() and "only gossips" in log.read_text())
            if not done.is_set():
                os.kill(os.getpid(), signal.SIGINT)

        log.unlink(missing_ok=True)
        person = threading.Thread(target=interrupt)
        person.start()
        try:
            return self.do("run", "run.toml", "--out", out)
        finally:
            done.set()
            person.join()

    def fails(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
        """The one line that a mistaken command prints."""
        capsys.readouterr()
        with self.here():
            assert main(["peer", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        *progress, last = printed.err.strip().splitlines()
        assert last.startswith("meadow: ") and "Traceback" not in printed.err
        assert all(line.endswith(" ...") for line in progress), progress
        return last


def key_of(person: Person) -> bytes:
    return certificate_of(person.identity).peer


def base_of(person: Person) -> str:
    return load(person.config).model.base


def start(person: Person, *arguments: str) -> subprocess.Popen[bytes]:
    """The command as a process, as a user has it."""
    environment = {**os.environ, HOME: str(person.folder / "home"), "OMP_NUM_THREADS": "1"}
    with (person.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "meadow.cli", "peer", *arguments],
            cwd=person.folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip


def log_of(person: Person) -> str:
    return (person.folder / "log.txt").read_text()


def status(person: Person) -> dict[str, Any]:
    path = person.folder / "peers" / "run" / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
