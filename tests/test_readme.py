"""The README's commands, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meadow.identity import Identity
from meadow.processes import free_port
from meadow.server.registry import Registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def meadow(folder: Path, *arguments: str) -> None:
    """Run a command that has to succeed, as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "meadow.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_what_ci_and_packaging_know() -> None:
    first, second = code(section("Two commands"), "sh")
    assert first.strip() == "pip install . && meadow demo"
    assert second.strip() == "pip install '.[test]' && pytest"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install --quiet '.[test]'" in script and "\npytest\n" in script
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        project["scripts"]["meadow"] == "meadow.cli:main"
        and "test" in project["optional-dependencies"]
    )


def test_the_demos_output_is_shown() -> None:
    shown = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for words in ("base", "trained alone", "federated", "centralised", "share", "adapter"):
        assert words in shown


@pytest.mark.long
def test_ones_own_text_following_the_readme_only(tmp_path: Path) -> None:
    """Three participants with the README's own rows, then every command and the snippet."""
    own = section("Your own text")
    rows = [json.loads(line) for line in code(own, "json")[0].splitlines()]
    assert len({row["client"] for row in rows}) == 3
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for line in code(own, "sh")[0].splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "meadow"
        meadow(tmp_path, *command[1:])
        if command[1] == "init":  # fewer rounds and steps than a user would make
            written = (tmp_path / "run.toml").read_text()
            shorter = written.replace("count = 10 ", "count = 2 ").replace(
                "steps = 10 ", "steps = 2 "
            )
            assert shorter != written
            (tmp_path / "run.toml").write_text(shorter)
    snippet = code(own, "python")[0]
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    metrics = [
        json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    ]
    assert len(metrics) == 3 and metrics[-1]["train_loss"].keys() == {"ada", "bob", "eve"}


@pytest.mark.long(minutes=3)
def test_bytes_instead_of_gradients_following_the_readme_only(tmp_path: Path) -> None:
    """The README's rows once more; `meadow peer demo` has a test of its own."""
    rows = code(section("Your own text"), "json")[0]
    (tmp_path / "text.jsonl").write_text(rows)
    bytes_section = section("Participants that can only run inference, and no coordinator")
    first, second = code(bytes_section, "sh")
    assert second.strip() == "meadow peer demo"
    for line in first.splitlines():
        command = shlex.split(line, comments=True)
        meadow(tmp_path, *command[1:])
    written = (tmp_path / "runs/bytes/metrics.jsonl").read_text().splitlines()
    last = json.loads(written[-1])
    assert last["round"] == 10 and last["loss"] < json.loads(written[0])["loss"]


@pytest.mark.long
def test_serving_following_the_readme_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with the demo, serve, call; the call by Python, for curl may be missing."""
    (block,) = code(section("Serve it"), "sh")
    train, serve, call = (shlex.split(line) for line in block.splitlines())
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path / "home"))
    meadow(tmp_path, *train[1:], "--quick")
    address = f"127.0.0.1:{free_port()}"
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "meadow.cli", *serve[1:], "--listen", address]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while "\ncurl " not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert call[0] == "curl" and call[2] == "-H" and call[4] == "-d"
        name, _, value = call[3].partition(": ")
        url = call[1].replace("127.0.0.1:8000", address)
        request = urllib.request.Request(url, call[5].encode(), {name: value})
        with urllib.request.urlopen(request) as answer:
            told = json.load(answer)
        assert told["model"] == "demo@v1" and told["usage"]["completion_tokens"] > 0
    finally:
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


@pytest.mark.long
def test_a_deployment_following_the_readme_only(short_path: Path) -> None:
    """One operator, one participant; `meadow demo --deploy` has a test of its own."""
    demo, operators, participants = code(section("Deploy it"), "sh")
    assert demo.strip() == "meadow demo --deploy"
    init, start, approve, status = (shlex.split(x, comments=True) for x in operators.splitlines())
    join, take_part = (shlex.split(x) for x in participants.splitlines())
    with Machines(short_path) as machines:
        machines.finish("operator", init)
        _shorten(short_path / "operator" / "run.toml")
        coordinator = machines.start("operator", start)
        said = machines.eventually(lambda: re.search(r"(meadow1:\S+)", machines.said(coordinator)))
        rows = code(section("Your own text"), "json")[0].splitlines()[:2]
        folder = short_path / "participant" / "FOLDER"
        folder.mkdir()
        (folder / "notes.txt").write_text(
            "\n".join(json.loads(row)["response"] for row in rows * 9)
        )
        joining = machines.start(
            "participant", [said[1] if word == "INVITATION" else word for word in join]
        )
        assert joining.stdin is not None
        joining.stdin.write(b"y\n")
        joining.stdin.close()
        machines.eventually(lambda: "waits for approval" in machines.said(coordinator))
        machines.finish("operator", approve)
        assert joining.wait(120) == 0, machines.said(joining)
        machines.start("participant", take_part)
        machines.finish("operator", status)
        assert coordinator.wait(300) == 0, machines.said(coordinator)
    assert (short_path / "operator/coordinator/run/adapter/adapter_model.safetensors").is_file()
    operator = Identity.load_or_create(short_path / "operator/home/identity.pem")
    with Registry.open(short_path / "operator/home/registry", operator) as registry:
        assert registry.verify("mail@v1").provenance.participants == 1
    assert not (short_path / "participant/home/registry").exists()


def _shorten(path: Path) -> None:
    """What the README says in words, on a machine of its own and with less work; it publishes."""
    text = path.read_text()
    address = f"127.0.0.1:{free_port()}"
    for old, new in (
        ('listen = "0.0.0.0:9440"', f'listen = "{address}"'),
        ("addresses = []", f'addresses = ["{address}"]'),
        ("invite = []", 'invite = ["ada"]'),
        ("\ncount = 10 ", "\ncount = 1 "),
        ("\nsteps = 10 ", "\nsteps = 1 "),
        ("max_length = 256 ", "max_length = 32 "),
        ('\nname = ""', '\nname = "mail"'),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


class Machines:
    """Two users with homes of their own, and what they have started."""

    def __init__(self, root: Path) -> None:
        self._root, self._running = root, list[subprocess.Popen[bytes]]()
        for who in ("operator", "participant"):
            (root / who / "home").mkdir(parents=True)

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            process.wait(60)
            assert process.stdin is not None
            process.stdin.close()

    def start(self, who: str, words: list[str]) -> subprocess.Popen[bytes]:
        folder = self._root / who
        with (folder / f"{len(self._running)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "meadow.cli", *words[1:]],
                cwd=folder, env={**os.environ, "MEADOW_HOME": str(folder / "home")},
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        process.args = folder / log.name
        self._running.append(process)
        return process

    def finish(self, who: str, words: list[str]) -> None:
        process = self.start(who, words)
        assert process.wait(120) == 0, self.said(process)

    def said(self, process: subprocess.Popen[bytes]) -> str:
        return Path(str(process.args)).read_text()

    def eventually(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 120
        while not (found := condition()):
            logs = [self.said(process) for process in self._running]
            assert time.monotonic() < deadline and not any(p.poll() for p in self._running), logs
            time.sleep(0.2)
        return found
