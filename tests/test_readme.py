"""The README's commands, run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.long
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
