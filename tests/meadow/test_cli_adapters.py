"""`meadow adapters …`: every command's report, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registries import STRANGER, write_run
from rich.console import Console
from tiny import save_base

from meadow import cli_adapters
from meadow.config import ModelConfig
from meadow.errors import ConfigError, IdentityError, MeadowError, PromotionError, RegistryError
from meadow.identity import own_identity
from meadow.peft_adapters.blueprint import open_blueprint
from meadow.server import measured_gate

Do = Callable[..., Any]


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Do:
    """Run `meadow adapters` with these arguments; what it reports, as JSON has it."""
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()

    def add(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=about)
        command.set_defaults(run=run)
        return command

    cli_adapters.add_commands(parser.add_subparsers(required=True), add)

    def run(*arguments: str | Path) -> Any:
        options = parser.parse_args(list(map(str, arguments)))
        return json.loads(json.dumps(options.run(options, Console(stderr=True))))

    return run


def run_of(number: int, **stated: Any) -> Path:
    return write_run(Path(f"run-{number}"), number, own_identity(), **stated)


def test_from_a_run_to_an_alias_and_back(do: Do, capsys: pytest.CaptureFixture[str]) -> None:
    assert do("list") == []
    first = do("publish", run_of(1, loss=2.0), "team/mail", "--alias", "prod")
    second = do("publish", run_of(2, loss=1.5), "team/mail")
    assert (first["number"], second["number"]) == (1, 2)
    assert do("promote", "team/mail@v2", "--why", "better")["number"] == 2
    do("promote", "team/mail@v1", "--alias", "canary")
    rows = do("list")
    assert [(row["number"], row["aliases"]) for row in rows] == [(1, ["canary"]), (2, ["prod"])]
    shown = do("show", "team/mail")
    assert (shown["loss"], shown["strategy"], shown["aliases"]) == (1.5, "fedavg_lora", ["prod"])
    assert shown["signers"] == {own_identity().key_id: "who made this registry"}
    assert do("rollback", "team/mail", "--why", "complaints")["number"] == 1
    kinds = [entry["kind"] for entry in do("history", "team/mail", "--alias", "prod")]
    assert kinds == ["moved", "moved", "rolled back"]
    assert "team/mail@prod points to team/mail@v1 again" in capsys.readouterr().out


def test_gates_refuse_and_can_be_overruled(do: Do) -> None:
    do("publish", run_of(1, loss=1.0), "mail", "--alias", "prod")
    worse = run_of(2, loss=1.1)
    with pytest.raises(PromotionError, match="more than 1.0000"):
        do("publish", worse, "mail", "--alias", "prod")
    assert [entry["kind"] for entry in do("history", "mail")][-1] == "refused"
    with pytest.raises(PromotionError, match="not trained from mail@v1"):
        do("promote", "mail@v2", "--max-increase", "0.2", "--descends")
    do("promote", "mail@v2", "--max-increase", "0.2")
    with pytest.raises(PromotionError, match="that is a rollback"):
        do("promote", "mail@v1")
    do("promote", "mail@v1", "--force", "--why", "the fire drill")


def test_it_is_measured_as_it_is_served(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked, and that the answers decide; test_measure_versions has what answers."""
    asked: list[Any] = []

    def measure(question: Any) -> Any:
        asked.append(question)
        answers = ["no"] if question["canaries"] else []
        return {"rows": 1, "base_loss": 9.0, "versions": [{"loss": 9.5, "answers": answers}]}

    monkeypatch.setattr(measured_gate, "in_own_process", measure)
    rows, canaries = tmp_path / "rows.jsonl", tmp_path / "canaries.toml"
    rows.write_text('{"text": "a"}\n')
    canaries.write_text('[[canary]]\nprompt = "Ready?"\ncontains = "yes"\n')
    do("publish", run_of(1), "mail")
    with pytest.raises(ConfigError, match="need --base"):
        do("promote", "mail@v1", "--canaries", canaries)
    how = ("--base", "nano", "--dtype", "bfloat16", "--quantize", "4bit")
    with pytest.raises(PromotionError, match=r"9\.5000 .*than 9\.0000.*'Ready\?' was"):
        do("promote", "mail@v1", "--held-out", rows, "--canaries", canaries, *how)
    (question,) = asked
    assert (question["base"], question["dtype"], question["quantize"]) == (how[1], how[3], how[5])
    assert (question["held_out"], question["canaries"]) == (str(rows), str(canaries))
    assert do("promote", "mail@v1", "--held-out", rows, "--max-increase", "0.5", *how)
    assert len(asked) == 2
    do("promote", "mail@v1", "--alias", "canary", "--canaries", canaries, *how, "--force")
    assert len(asked) == 2, "without any gate"


def test_what_others_wrote_is_shown_as_it_is(
    do: Do, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    do("publish", run_of(1, strategy="[/x]\x1b[2J"), "mail")
    do("promote", "mail@v1", "--why", "[bold]why[/nothing]")
    for command in (("list",), ("show", "mail"), ("history", "mail")):
        capsys.readouterr()
        do(*command)
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert ("[bold]why[/nothing]" if command[0] == "history" else "[/x]\\x1b[2J") in shown


def test_verify_names_what_is_broken(do: Do, tmp_path: Path) -> None:
    do("publish", run_of(1), "mail")
    broken = do("publish", run_of(2), "mail")
    assert [row["fault"] for row in do("verify")] == ["", ""]
    folder = tmp_path / "home" / "registry" / "versions" / broken["id"]
    (folder / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(RegistryError, match="1 of 2 do not verify: mail@v2"):
        do("verify")
    assert do("verify", "mail@v1")[0]["fault"] == ""


def test_a_base_that_does_not_fit(do: Do, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(MeadowError, match="was trained on base"):
        do("publish", run_of(1), "mail", "--base", base)
    digest = open_blueprint(ModelConfig(base=str(base))).digest
    with pytest.raises(MeadowError, match=r"m\.q_proj matches no layer"):
        do("publish", run_of(2, base_digest=digest), "mail", "--base", base)
    do("publish", run_of(3, base_digest=digest), "mail")
    with pytest.raises(RegistryError, match="do not verify"):
        do("verify", "--base", base)


def test_pin_and_gc(do: Do) -> None:
    for number in (1, 2, 3):
        do("publish", run_of(number), "mail")
    do("promote", "mail@v3")
    do("pin", "mail@v1", "--why", "audit")
    promised = do("gc", "--days", "0", "--dry-run")
    assert [version["number"] for version in promised["versions"]] == [2]
    assert do("gc", "--days", "0") == {**promised, "dry_run": False}
    do("pin", "mail@v1", "--remove")
    assert [v["number"] for v in do("gc", "--days", "0")["versions"]] == [1]
    with pytest.raises(ConfigError, match="cannot be below 0"):
        do("gc", "--days", "-1")


def test_to_another_registry(do: Do) -> None:
    do("publish", run_of(1), "mail")
    do("export", "a.tar", "--all")
    assert do("import", "a.tar", "--registry", "other")[0]["number"] == 1
    do("trust", "--remove", own_identity().key_id, "--registry", "third")
    with pytest.raises(IdentityError, match="--trust"):
        do("import", "a.tar", "--registry", "third")
    do("import", "a.tar", "--registry", "third", "--trust", own_identity().key_id)
    assert [row["name"] for row in do("list", "--registry", "third")] == ["mail"]
    with pytest.raises(RegistryError, match="nothing is named"):
        do("export", "b.tar")


def test_whose_signatures_count(do: Do) -> None:
    assert list(do("trust", "--own", "me.pem")["trusted"]) == [own_identity().key_id]
    assert Path("me.pem").read_bytes() == own_identity().public_pem
    run = write_run(Path("run"), signer=STRANGER)
    with pytest.raises(IdentityError, match="no key that is trusted"):
        do("publish", run, "mail")
    Path("other.pem").write_bytes(STRANGER.public_pem)
    found = do("trust", "other.pem", "--label", "the other ward")["trusted"]
    assert found[STRANGER.key_id] == "the other ward"
    do("publish", run, "mail")
    do("trust", "--remove", STRANGER.key_id)
    with pytest.raises(RegistryError, match="do not verify"):
        do("verify")
    Path("junk.pem").write_text("junk")
    with pytest.raises(IdentityError, match="not a readable PEM"):
        do("trust", "junk.pem")
    with pytest.raises(ConfigError, match="cannot read none.pem"):
        do("trust", "none.pem")


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "mail"), ("show", "../mail"), ("promote", "mail@v1"), ("rollback", "mail"),
        ("publish", "nowhere", "mail"), ("publish", "nowhere", "../mail"), ("pin", "mail"),
        ("history", "--alias", "prod"), ("import", "none.tar"), ("list", ".."),
        ("verify", "mail@v3"), ("trust", "--remove", "00"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(do: Do, arguments: tuple[str, ...]) -> None:
    with pytest.raises(MeadowError) as caught:
        do(*arguments)
    assert str(caught.value) and "\n" not in str(caught.value)
