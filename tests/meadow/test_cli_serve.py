"""`meadow serve` and `meadow keys`: what they say, and how they end."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served_registry import ServedRegistry

from meadow.cli import main
from meadow.processes import free_port

PATIENCE = 120.0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a user's mistake leads to."""
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    line = said[-1]
    assert line.startswith("meadow: ") and "Traceback" not in "".join(said)
    return line


# --- what keeps a server from starting -----------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:0", ":0", "[::]:0", "example.org:80"])
def test_beyond_loopback_only_with_keys_or_on_purpose(
    capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    line = refused(capsys, "serve", "--listen", listen)
    assert "without keys would let anybody in" in line and "--open" in line


@pytest.mark.parametrize("listen", ["8000", "localhost:", "localhost:x", "127.0.0.1:70000"])
def test_an_address_is_host_and_port(capsys: pytest.CaptureFixture[str], listen: str) -> None:
    assert "is not host:port" in refused(capsys, "serve", "--listen", listen)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(capsys, "serve", "--listen", address)
    assert f"cannot listen at {address}" in line and "--listen" in line


def test_files_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere, free = str(tmp_path / "no"), ("--listen", "127.0.0.1:0")
    assert "no such file of keys" in refused(capsys, "serve", "--keys", nowhere, *free)
    assert "no registry there" in refused(capsys, "serve", "--registry", nowhere, *free)
    assert "no such folder" in refused(capsys, "serve", "--base", nowhere, *free)
    assert not Path(nowhere).exists()


def test_bounds_that_no_base_can_keep(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "serve", "--listen", "127.0.0.1:0", "--max-length", "100000")
    assert "max_length = 100000" in line and "reads at most 256" in line
    line = refused(capsys, "serve", "--listen", "127.0.0.1:0", "--kv-tokens", "10")
    assert "kv_tokens = 10" in line


def test_recorded_steps_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """And it is said before the base is loaded."""
    free = ("--listen", "127.0.0.1:0", "--device", "cpu")
    line = refused(capsys, "serve", "--cuda-graphs", "--base", "no/such-base", *free)
    assert "CUDA graphs need a CUDA device" in line and "without --cuda-graphs" in line


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "keys.json")
    assert main(["keys", "add", path, "ada", "--per-minute", "60", "--at-once", "2"]) == 0
    made = capsys.readouterr()
    key = made.out.strip()
    assert re.fullmatch(r"mdw_[0-9a-f]{12}_[0-9a-f]{64}", key) and "shown this once" in made.err
    assert main(["keys", "add", path, "ops", "--scope", "admin", "--scope", "inference"]) == 0
    capsys.readouterr()
    assert main(["keys", "list", path, "--json", str(tmp_path / "list.json")]) == 0
    shown = capsys.readouterr().out
    assert "ada" in shown and key.rpartition("_")[2] not in shown
    ada, ops = json.loads((tmp_path / "list.json").read_text())
    assert (ada["scopes"], ada["per_minute"], ada["at_once"]) == (["inference"], 60, 2)
    assert ops["scopes"] == ["inference", "admin"]
    assert main(["keys", "revoke", path, "ada"]) == 0
    assert "no key called 'ada'" in refused(capsys, "keys", "revoke", path, "ada")
    assert "there is a key called 'ops'" in refused(capsys, "keys", "add", path, "ops")


# --- as a process --------------------------------------------------------------------------------


class Process:
    """`meadow serve`, started as its user does."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "meadow.cli", "serve", *arguments],
                stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.wait(lambda: "\ncurl " in self.said())
        found = re.search(r"http://([^/\s]+)/v1", self.said())
        assert found is not None
        self.address = found[1]

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            data = None if body is None else json.dumps(body)
            kind = {"Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", path, data, kind)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None
        finally:
            connection.close()

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[ServedRegistry]:
    with ServedRegistry(tmp_path) as shelf:
        shelf.publish(1)
        shelf.publish(2, "canary")
        yield shelf


def arguments(shelf: ServedRegistry, *more: str) -> list[str]:
    given = ["--base", str(shelf.base), "--registry", str(shelf.folder), "--device", "cpu"]
    return [*given, "--kv-tokens", "8192", *more]


@pytest.mark.long
def test_a_server_says_what_it_serves_and_how_to_call_it(
    shelf: ServedRegistry, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    server = Process(
        tmp_path / "log", *arguments(shelf, "--listen", "127.0.0.1:0", "--json", str(report))
    )
    assert "serving base with news, news@canary at http://127.0.0.1:" in server.said()
    curl = shlex.split(next(x for x in server.said().splitlines() if x.startswith("curl ")))
    body = json.loads(curl[curl.index("-d") + 1])
    status, told = server.ask(curl[1].removeprefix(f"http://{server.address}"), body)
    assert status == 200 and told["model"] == "news@v1"
    assert server.end(signal.SIGTERM) == 0
    assert server.said().rstrip().endswith("ended")
    assert json.loads(report.read_text())["finished"] is True


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_under_way_is_answered_before_the_end(
    shelf: ServedRegistry, tmp_path: Path, number: signal.Signals
) -> None:
    server = Process(tmp_path / "log", *arguments(shelf, "--listen", "127.0.0.1:0"))
    host, _, port = server.address.rpartition(":")
    body = json.dumps(
        {"model": "news", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    ).encode()
    with socket.create_connection((host, int(port)), PATIENCE) as caller:
        caller.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        heard = caller.recv(1024)
        server.process.send_signal(number)
        while more := caller.recv(65536):
            heard += more
    assert b'"finish_reason":"length"' in heard and b"data: [DONE]" in heard
    assert server.process.wait(PATIENCE) == 0


@pytest.mark.long
def test_a_server_that_was_killed_serves_the_same_again(
    shelf: ServedRegistry, tmp_path: Path
) -> None:
    """kill -9 while it answers."""
    address = f"127.0.0.1:{free_port()}"
    body = {"model": "news", "prompt": "say a", "temperature": 0, "max_tokens": 20}
    first = Process(tmp_path / "first", *arguments(shelf, "--listen", address))
    models = first.ask("/v1/models")
    said = [first.ask("/v1/completions", {**body, "model": name})[1]["choices"]
            for name in ("base", "news", "news@canary")]  # fmt: skip
    with socket.create_connection(tuple(address.split(":")), PATIENCE) as caller:  # type: ignore[arg-type]
        long = json.dumps({**body, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
        caller.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            + f"\r\nContent-Length: {len(long)}\r\n\r\n".encode()
            + long
        )
        assert caller.recv(1024)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Process(tmp_path / "second", *arguments(shelf, "--listen", address))
    assert second.ask("/v1/models") == models
    again = [second.ask("/v1/completions", {**body, "model": name})[1]["choices"]
             for name in ("base", "news", "news@canary")]  # fmt: skip
    assert again == said
    shelf.registry.promote("news@v2")
    second.wait(lambda: bool(second.ask("/v1/completions", body)[1]["model"] == "news@v2"))
    assert second.end(signal.SIGTERM) == 0
