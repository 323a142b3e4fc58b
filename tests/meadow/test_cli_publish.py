"""`meadow publish` as a process: servers are brought into step, and the gateway answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from fake_vllm import KEY, FakeVllm
from registries import adapter, write_run
from vllm_stage import name_of, said_by

from meadow.cli import main
from meadow.identity import own_identity
from meadow.peft_adapters.signed_adapter import SignedAdapter
from meadow.server.registry import Registry, default_folder


def publish(root: Path, number: int) -> None:
    """A version in this user's registry, with the alias that points to it."""
    run = write_run(root / f"run-{number}", number, own_identity())
    files = SignedAdapter.read(run / "adapter", run / "manifest.json")
    assert files.id == adapter(number).id
    with Registry.open(default_folder(), own_identity()) as registry:
        registry.promote(registry.keep("mail", files))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return tmp_path


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meadow.cli", "publish", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ),
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def line_with(child: asyncio.subprocess.Process, pattern: str) -> str:
    """The first group of the first line that matches."""
    assert child.stdout is not None
    while line := (await child.stdout.readline()).decode():
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"it ended without {pattern}")


def test_it_runs_follows_the_registry_and_ends_when_asked(home: Path) -> None:
    publish(home, 1)
    (home / "keys").write_text("mine\n")
    report = home / "report.json"

    async def whole() -> None:
        async with FakeVllm() as first, FakeVllm() as second, aiohttp.ClientSession() as client:
            options = ["--url", first.url, "--url", second.url, "--folder", str(home / "shared")]
            options += ["--gateway", "127.0.0.1:0", "--keys", str(home / "keys")]
            options += ["--poll", "0.05", "--drain", "0", "--json", str(report)]
            async with process("--to", "vllm", *options, "mail") as child:
                url = await line_with(child, r"gateway: (http://\S+)")
                await line_with(child, rf"(mail is {name_of(1)})")
                headers = {"Authorization": "Bearer mine"}
                asked = {"model": "mail", "prompt": "hi", "max_tokens": 2}

                async def answer() -> str:
                    where = f"{url}/v1/completions"
                    async with client.post(where, json=asked, headers=headers) as found:
                        return str((await found.json())["choices"][0]["text"])

                assert await answer() == said_by(1, "hi", 2)
                await asyncio.to_thread(publish, home, 2)
                await line_with(child, rf"(mail is {name_of(2)})")
                assert await answer() == said_by(2, "hi", 2)
                await line_with(child, rf"({name_of(1)} is dropped)")
                child.send_signal(signal.SIGTERM)
                assert await child.wait() == 0
            assert set(first.adapters) == set(second.adapters) == {name_of(2)}

    asyncio.run(whole())
    told = json.loads(report.read_text())
    assert told == {"models": {"mail": name_of(2), "mail@prod": name_of(2)}, "faults": {}}


def test_a_registry_is_no_folder_for_copies(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every version that no alias means would have been deleted from it."""
    publish(home, 1)
    publish(home, 2)
    link = home / "link"
    link.symlink_to(default_folder())
    for folder in (default_folder(), link):
        arguments = ["--url", "http://127.0.0.1:9", "--folder", str(folder), "--once", "mail"]
        assert main(["publish", *arguments]) == 2
        assert "is a registry" in capsys.readouterr().err
    with Registry.open(default_folder(), own_identity()) as registry:
        assert {registry.verify(one).id for one in registry.versions()} == {
            adapter(number).id for number in (1, 2)
        }


def once(
    home: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, set[str]]:
    """Run `meadow publish --once` against one server, in a thread: status, errors, its adapters."""

    async def whole() -> tuple[int, set[str]]:
        async with FakeVllm() as server:
            arguments = ["publish", "--url", server.url, "--folder", str(home / "shared"), "--once"]
            status = await asyncio.to_thread(main, [*arguments, *options, "mail"])
            return status, set(server.adapters)

    status, adapters = asyncio.run(whole())
    return status, capsys.readouterr().err.replace("\n", " "), adapters


def test_once_ends_in_step(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(home, 1)
    assert once(home, capsys) == (0, "", {name_of(1)})


def test_once_says_what_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(home, 1)
    (home / "wrong").write_text("nonsense\n")
    status, said, adapters = once(home, capsys, "--key-file", str(home / "wrong"))
    assert (status, adapters) == (2, set())
    assert "refuses /v1/models (401): " in said and "is its API key right?" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gateway", "0.0.0.0:8000"], "everybody could ask"),
        (["--gateway", "8000"], "is not host:port"),
        (["--gateway", "127.0.0.1:0", "--once"], "--once ends"),
        (["--gateway", "127.0.0.1:0", "--keys", "/nowhere/keys"], "cannot read /nowhere/keys"),
        (["--poll", "0"], "--poll is more than 0"),
        (["--canaries", "/nowhere/c.toml"], "cannot read /nowhere/c.toml"),
        (["../mail"], "cannot be an adapter's name"),
    ],
)
def test_mistakes_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = ["publish", "--url", "http://127.0.0.1:1", "--folder", str(home / "shared")]
    assert main([*command, *options, "mail"]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_one_folder_has_one_publisher(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from meadow.store import locked

    (home / "shared").mkdir()
    with locked(home / "shared" / "publisher.lock", ""):
        status, said, _ = once(home, capsys)
    assert status == 2 and "one publisher has one folder" in said
