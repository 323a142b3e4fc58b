"""docs/how-to-publish.md: its settings and canaries are read, its commands are real ones."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

from meadow.cli import build_parser
from meadow.config import ServeConfig, parse
from meadow.peft_adapters.manifest import Provenance
from meadow.server.canaries import read_canaries
from meadow.server.publishing import check_serve, serving_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to-publish.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_settings_are_what_a_run_takes(tmp_path: Path) -> None:
    first, second, canaries = blocks("toml")
    (tmp_path / "canaries.toml").write_text(canaries)
    (tmp_path / "held-out.jsonl").write_text('{"text": "a"}\n')
    for text in (first, second):
        config = parse(text, folder=tmp_path)
        check_serve(config)
        assert config.serve != ServeConfig()
    assert serving_of(parse(second, folder=tmp_path)).precision == "bfloat16"


def test_the_canary_is_judged_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "canaries.toml").write_text(blocks("toml")[2])
    (canary,) = read_canaries(tmp_path / "canaries.toml")
    assert canary.faults("A machine that weaves thread into cloth.") == []
    assert len(canary.faults("I cannot say.")) == 3


def test_the_commands_are_understood() -> None:
    text = "".join(blocks("sh")).replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("meadow ")]
    assert [command[1] for command in commands] == ["adapters", "adapters", "publish"]
    for command in commands:
        build_parser().parse_args(command[1:])


def test_the_reference_names_all_that_a_manifest_states() -> None:
    page = (ROOT / "docs" / "ref-registry.md").read_text(encoding="utf-8")
    stated = page.partition("## What a manifest states")[2].partition("\n## ")[0]
    for part in fields(Provenance):
        assert f"`{part.name}`" in stated
