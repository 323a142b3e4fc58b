"""The pages on deployment: their commands exist, their settings are real, their errors are said."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from meadow import config as configuration
from meadow.cli import build_parser
from meadow.cli_client import with_run
from meadow.cli_coordinator import with_start

ROOT = Path(__file__).parents[1]
HOW_TO = "docs/how-to-deploy.md"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["meadow"]]


@pytest.mark.parametrize("page", [HOW_TO, "README.md"])
def test_every_command_is_one(page: str) -> None:
    found = commands(page)
    assert len(found) > 8
    for words in found:
        build_parser().parse_args(with_run(with_start(words)))


def test_the_page_has_every_command_of_both_sides() -> None:
    shown = {tuple(with_run(with_start(words))[:2]) for words in commands(HOW_TO)}
    shown |= {("client", "run"), ("coordinator", "readmit")}  # in its text
    parser = build_parser()
    for side in ("coordinator", "client"):
        for name in _verbs(parser, side):
            assert (side, name) in shown, f"meadow {side} {name}"


def _verbs(parser: argparse.ArgumentParser, *path: str) -> list[str]:
    """What can follow these words on the command line."""
    (commands,) = [action for action in parser._actions if action.metavar == "COMMAND"]
    assert isinstance(commands.choices, dict)
    return _verbs(commands.choices[path[0]], *path[1:]) if path else list(commands.choices)


def test_its_settings_are_settings() -> None:
    for block in blocks(HOW_TO, "toml"):
        configuration.parse(block)


def test_its_errors_are_what_the_program_says() -> None:
    text = (ROOT / HOW_TO).read_text(encoding="utf-8").partition("## When something is wrong")[2]
    cells = re.findall(r"^\| (`.*`) \| ", text, flags=re.MULTILINE)
    lines = [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]
    assert len(lines) > 10
    files = [path for name in ("client", "server", "meadow") for path in (ROOT / name).glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    said = re.sub(r'"\s*\n\s*f?"', "", source)  # one text over two lines of code
    for line in lines:
        for part in re.split(r"\.\.\.|gateway ended|this invitation|exit 2", line):
            words = part.strip(" ()")
            assert words in said or words.partition(":")[0] in said, line
