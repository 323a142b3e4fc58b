"""The page on serving: its commands exist, its examples work, its errors are said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from scripted_serving import NEWS, scripted_front, served

from meadow.cli import build_parser
from meadow.server.serving import openai_errors
from meadow.server.serving.openai_types import ChatRequest, CompletionRequest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/how-to-serve.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_command_is_one() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`(meadow keys revoke [^`]+)`", PAGE)
    assert len(lines) > 8
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])


def test_every_option_that_it_names_is_one() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    of_keys = {"--per-minute", "--at-once"}
    build_parser().parse_args(["keys", "add", "f", "n", *(f"{option}=1" for option in of_keys)])
    assert len(named) > 8
    for option in named - of_keys:
        build_parser().parse_args(["serve", option, *VALUES.get(option, ["1"])])


VALUES: dict[str, list[str]] = {
    "--open": [],
    "--cuda-graphs": [],
    "--dtype": ["bfloat16"],
    "--quantize": ["4bit"],
    "--device": ["cuda"],
}


def test_the_clients_example_works(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    with served(scripted_front()) as server:
        here = code.replace("http://127.0.0.1:8000/v1", server.url)
        assert here != code
        exec(compile(here, "how-to-serve.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{NEWS} abc")


def test_every_key_of_a_request_is_told() -> None:
    told = set(re.findall(r"`(\w+)`", section("What can be asked").partition("What would")[0]))
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert known - {"model", "stream", "best_of"} <= told


def test_every_status_is_told_with_its_type() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert {int(status): kind for status, kind in rows} == openai_errors._TYPES


def test_its_lines_are_what_the_program_says() -> None:
    table = section("When something is wrong").partition("`meadow serve` itself")[2]
    cells = re.findall(r"^\| (`.*?`) \| ", table, flags=re.MULTILINE)
    lines = [line for cell in cells for line in re.findall(r"`([^`]+)`", cell)]
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "server/serving").glob("*.py")
    )
    assert len(lines) > 4 and [line for line in lines if line not in source] == []
