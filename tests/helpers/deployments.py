"""A small deployment as real processes, whose processes a test can hold still and kill.

Rounds begin when a test says so, so that it can arrange a fault before one begins.  A process that
is held (SIGSTOP) keeps a round at a known point, however fast the machine is; nothing here sleeps
for a time that was guessed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from meadow.client.home import OUTGOING
from meadow.client.membership import Membership
from meadow.client.outgoing_log import Entry, read
from meadow.client.rows import Row
from meadow.client.sources import read_rows
from meadow.closeable import Closeable
from meadow.config import Config, write
from meadow.processes import free_port, is_alive
from meadow.server.coordinator_home import CoordinatorHome
from meadow.simulation.deploy_demo import Process, Stage, processes_in
from meadow.simulation.engine import simulate
from meadow.store import Disk

PEOPLE = ("email", "http")
"""Two of nano's participants; each is given a few rows of its own."""

ROWS = 12
PATIENCE = 150.0
"""Seconds within which everything that a test waits for has to happen, on a slow machine."""
_POLL = 0.05

_SMALL = Config().replace(
    model={"device": "cpu", "rank": 4},
    data={"max_length": 64, "train_rows": 8, "held_out_rows": 4},
    rounds={"count": 1, "deadline_seconds": 300.0},
    clients={"steps": 2, "batch": 2},
    simulation={"threads": 1},
    coordinator={"approve": "invited", "invite": list(PEOPLE), "retry_seconds": 1.0},
)


def small_config(rounds: int, **sections: dict[str, Any]) -> Config:
    """A run that is quick to train; `sections` change some of its settings."""
    return _SMALL.replace(rounds={"count": rounds}).replace(**sections)


class Stuck(AssertionError):
    """Something did not happen in time; says what, and what the processes said last."""


class Deployment(Closeable):
    """A coordinator and participants on loopback, in one folder with a short name."""

    def __init__(
        self, out: Path, config: Config, machines: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """`machines` adds to the environment of a participant's processes."""
        self.port, self.config, self._machines = free_port(), config, machines or {}
        self.stage = Stage(out, config)
        self.home = CoordinatorHome(self.stage.coordinator)
        self.at = "the start"
        self._write()
        self.reach_at(listen=self.port, address=self.port)
        self.coordinator = self.stage.operator("coordinator", "run.toml")
        self.daemons = {name: self._participant(name, "daemon") for name in PEOPLE}
        self._commands = 0
        self._held: set[int] = set()

    def close(self) -> None:
        """End everything, whatever state it is in."""
        for pid in self._held.copy():
            self.release(pid)
        for process in (*self.daemons.values(), self.coordinator):
            process.stop()

    # People's commands

    def start(self) -> None:
        """Coordinator, joining, training; returns when round 1 is done and round 2 waits."""
        self.start_coordinator()
        for name, word in self.invitations().items():
            self.join(name, word)
        self.train()

    def train(self) -> None:
        """Start the daemons; returns when round 1 is done and round 2 waits."""
        for daemon in self.daemons.values():
            daemon.start()
        self.begin(1)
        self.end(1)

    def start_coordinator(self) -> None:
        self.coordinator.start()
        self.wait("gateway that listens", lambda: self._listens(self.port))

    def _listens(self, port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def invitations(self) -> dict[str, str]:
        """Name to invitation, off the operator's terminal."""
        words: list[str] = []

        def printed() -> bool:
            text = self.coordinator.log.read_text(errors="replace")
            words[:] = [word for word in text.split() if word.startswith("meadow1:")]
            return len(words) == len(self.config.coordinator.invite)

        self.wait("the invitations", printed)
        return dict(zip(self.config.coordinator.invite, words, strict=True))

    def join(self, name: str, word: str, *more: str) -> None:
        self.client(name, "join", word, "--data", "rows.jsonl", "--yes", *more)

    def operator(self, *arguments: str) -> str:
        """What one of the operator's commands says."""
        return self._done(self.stage.operator, *arguments)

    def client(self, who: str, *arguments: str) -> str:
        return self._done(lambda name, *rest: self._participant(who, name, *rest), *arguments)

    def _participant(self, who: str, name: str, *arguments: str) -> Process:
        made = self.stage.participant(who, name, *arguments)
        made.environment = {**made.environment, **self._machines.get(who, {})}
        return made

    def somebody(self, name: str) -> Path:
        """A folder like a participant's, for whoever else knocks."""
        folder = self.stage.out / name
        (folder / "home").mkdir(parents=True)
        shutil.copy(self.stage.out / PEOPLE[0] / "rows.jsonl", folder)
        return folder

    def _done(self, make: Callable[..., Process], *arguments: str) -> str:
        self._commands += 1
        command = make(f"{self._commands}-{arguments[0]}", *arguments)
        command.start()
        assert command.process is not None
        code = command.process.wait(PATIENCE)
        said = command.log.read_text(errors="replace").strip()
        if code:
            raise CommandFailed(arguments, code, said)
        return said

    # Rounds

    def pause(self) -> None:
        self.home.paused.touch()

    def resume(self) -> None:
        self.home.paused.unlink(missing_ok=True)

    def begin(self, number: int) -> None:
        """Let a round begin, and no further one."""
        self.resume()
        self.wait(f"round {number} to begin", lambda: bool(self.events("round_opened", number)))
        self.pause()

    def end(self, number: int) -> None:
        self.wait(f"round {number} to close", lambda: bool(self.events("round_closed", number)))

    def finish(self) -> None:
        """The last round is done: wait for the adapter and the coordinator's own end."""
        self.resume()
        assert self.coordinator.process is not None
        self.wait("the coordinator to end", self.coordinator.ended)

    def events(self, kind: str, number: int | None = None) -> list[dict[str, Any]]:
        """The coordinator's events of one kind, of one round or of all."""
        path = self.home.run / "events.jsonl"
        if not path.exists():
            return []
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
        rows = [json.loads(line) for line in whole if line.strip()]
        return [row for row in rows if row["kind"] == kind and number in (None, int(row["round"]))]

    def notices(self) -> str:
        return "\n".join(row["text"] for row in self.events("notice"))

    def contributed(self, name: str, number: int) -> bool:
        return any(row["client"] == name for row in self.events("contribution", number))

    def sent(self, name: str) -> list[Entry]:
        """What has left a participant's machine, or is about to."""
        path = self.folder(name) / OUTGOING
        return read(path) if path.exists() else []

    def has_trained(self, name: str, number: int) -> bool:
        """Whether an answer lies in the outbox and is about to leave."""
        return any(e.kind == "train" and e.round == number for e in self.sent(name))

    def received(self, name: str) -> int:
        """How many messages Flower's SuperNode has received whole."""
        log = self.folder(name) / "logs" / "supernode.log"
        return log.read_bytes().count(b"Received successfully") if log.exists() else 0

    # Processes

    def folder(self, name: str) -> Path:
        return self.stage.out / name / "home" / "clients" / name

    def service(self, name: str) -> int:
        """The process of one of the coordinator's services that runs now."""
        if name == "server app":
            return self._pid(name, lambda: int(self.home.server_app.read_text()))
        return self._pid(name, lambda: _supervised(self.home.logs, name))

    def part(self, who: str, name: str) -> int:
        """The process of one of a participant's parts that runs now."""
        if name == "client process":
            return self._pid(name, lambda: _below(self.part(who, "supernode"), "flwr-clientapp"))
        return self._pid(f"{who}'s {name}", lambda: _supervised(self.folder(who) / "logs", name))

    def has_client_process(self, who: str) -> bool:
        try:
            return bool(_below(_supervised(self.folder(who) / "logs", "supernode"), "flwr-cl"))
        except (OSError, ValueError, LookupError):
            return False

    def kill(self, pid: int) -> None:
        """SIGKILL, which a process that is held gets as well."""
        os.kill(pid, signal.SIGKILL)
        self._held.discard(pid)
        self.wait(f"process {pid} to be gone", lambda: not is_alive(pid))

    def kill_command(self, process: Process) -> None:
        """SIGKILL for a supervisor itself; what it started is left alone."""
        assert process.process is not None
        process.process.kill()
        process.process.wait()

    def kill_part(self, who: str, name: str) -> None:
        """SIGKILL for a part whose supervisor is gone, if it has not ended by itself."""
        pid = _supervised(self.folder(who) / "logs", name)
        with suppress(ProcessLookupError):
            self.kill(pid)

    @contextmanager
    def held(self, pid: int) -> Iterator[None]:
        """Keep a process still, which may be killed meanwhile."""
        os.kill(pid, signal.SIGSTOP)
        self._held.add(pid)
        try:
            yield
        finally:
            self.release(pid)

    def release(self, pid: int) -> None:
        if pid in self._held:
            self._held.discard(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Until a condition holds; Stuck where it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Stuck(f"at {self.at}: no {what} in {seconds:g} s\n{self._last_words()}")
            time.sleep(_POLL)

    def left_behind(self) -> list[str]:
        return processes_in(self.stage.out)

    def _pid(self, what: str, find: Callable[[], int]) -> int:
        found: list[int] = []

        def runs() -> bool:
            with suppress(OSError, ValueError, LookupError):
                found[:] = [find()]
            return bool(found) and is_alive(found[0])

        self.wait(f"{what} that runs", runs)
        return found[0]

    def _last_words(self) -> str:
        logs = [*self.stage.out.glob("*/*.log"), *self.home.logs.glob("*.log")]
        logs += [log for name in PEOPLE for log in (self.folder(name) / "logs").glob("*.log")]
        tails = ((log, log.read_text(errors="replace").strip().splitlines()[-6:]) for log in logs)
        return "\n".join(f"--- {log}\n" + "\n".join(lines) for log, lines in tails if lines)

    # What came of it

    def counted(self) -> dict[int, dict[str, int]]:
        """Round to participant to contributions, as the journal has them."""
        with closing(sqlite3.connect(self.home.run / "journal.db")) as database:
            rows = database.execute(
                "SELECT round, client, count(*) FROM contributions GROUP BY round, client"
            ).fetchall()
        found: dict[int, dict[str, int]] = {}
        for number, client, count in rows:
            found.setdefault(number, {})[client] = count
        return found

    def adapter(self) -> dict[str, torch.Tensor]:
        return dict(load_file(self.home.run / "adapter" / "adapter_model.safetensors"))

    def local_adapter(self) -> dict[str, torch.Tensor]:
        """The same run by the local engine, with nothing that fails."""
        source = {"source": str(self.stage.out / "everybody.jsonl")}
        result = simulate(self.config.replace(data=source), self.stage.out / "local")
        return dict(load_file(result.adapter / "adapter_model.safetensors"))

    def _write(self) -> None:
        """Everybody's text, and the operator's run.toml."""
        lines = []
        for name in PEOPLE:
            rows = _rows_of(name, self.config.data.chunk)
            folder = self.stage.out / name
            (folder / "home").mkdir(parents=True)
            text = "".join(_line(row) for row in rows)
            (folder / "rows.jsonl").write_text(text, encoding="utf-8")
            lines += [_line(row, client=name) for row in rows]
        (self.stage.out / "everybody.jsonl").write_text("".join(lines), encoding="utf-8")
        (self.stage.out / "operator" / "home").mkdir(parents=True)

    def reach_at(self, *, listen: int, address: int) -> None:
        """The ports of loopback where the gateway listens, and where participants reach it."""
        self.port = listen
        own = {"listen": f"127.0.0.1:{listen}", "addresses": [f"127.0.0.1:{address}"]}
        self.config = self.config.replace(coordinator=own)
        self._write_settings()

    def tell_address(self, who: str, port: int) -> None:
        """What a participant does on hearing that the coordinator has moved."""
        addresses = (f"127.0.0.1:{port}",)
        Membership.change(
            self.folder(who), Disk(), lambda now: dataclasses.replace(now, addresses=addresses)
        )

    def _write_settings(self) -> None:
        settings = write(self.config)
        (self.stage.out / "operator" / "run.toml").write_text(settings, encoding="utf-8")


class CommandFailed(Exception):
    """One of the commands ended with another status than 0."""

    def __init__(self, arguments: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"meadow {' '.join(arguments)[:80]} ended ({code}): {said}")
        self.code, self.said = code, said


def _rows_of(name: str, chunk: int) -> list[Row]:
    """A few rows of one of nano's participants, some of them held out."""
    rows = [row for row in read_rows("nano", chunk) if row.client == name]
    kept = [row for row in rows if row.split == "test"][:4]
    return [*[row for row in rows if row.split != "test"][: ROWS - len(kept)], *kept]


def _line(row: Row, **more: str) -> str:
    fields = {"prompt": row.prompt, "response": row.response, "split": row.split, **more}
    return json.dumps(fields) + "\n"


def _supervised(logs: Path, name: str) -> int:
    groups: dict[str, int] = json.loads((logs / "processes.json").read_text())
    return groups[name]


def _below(ancestor: int, word: str) -> int:
    """A process under another one, by a word of its command.  LookupError for none."""
    command = ["ps", "-A", "-ww", "-o", "pid=,ppid=,stat=,args="]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=3) for line in found.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows}
    for row in rows:
        if len(row) == 4 and word in row[3] and not row[2].startswith("Z"):
            pid = int(row[0])
            while pid := parents.get(pid, 0):
                if pid == ancestor:
                    return int(row[0])
    raise LookupError(word)
