"""docs/how-to-peers.md, command by command."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest
from peer_person import Person, base_of, key_of, log_of, start, status
from tiny_peers import adapter_bytes, eventually

from meadow.cli import main
from meadow.config import load

ROOT = Path(__file__).parents[2]
pytest_plugins = ("peer_person_fixtures",)


def free_port() -> int:
    """Of this moment: others have to know it before the command binds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def commands(heading: str) -> list[list[str]]:
    """The shell commands under a heading of the page, without `meadow` and comments."""
    text = (ROOT / "docs" / "how-to-peers.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)).splitlines()
    return [line.partition("#")[0].split()[1:] for line in lines if line.strip()]


@pytest.mark.long
def test_the_page_works_command_by_command(tmp_path: Path, base: Path) -> None:
    """Two founders and a joiner, each with a home of its own, in processes of their own."""
    ada, bob, eve = (
        Person(tmp_path / name, base, participant=name) for name in ("ada", "bob", "eve")
    )
    places = {person: f"127.0.0.1:{free_port()}" for person in (ada, bob)}
    card, init, charter = commands("Found a run")
    for person in (ada, bob):
        name = f"{person.folder.name}.card"
        person.do(*(places[person] if "example" in word else name if word == "ada.card" else word
                    for word in card[1:]))  # fmt: skip
        (tmp_path / "ada" / name).write_bytes((person.folder / name).read_bytes())
    written = ada.config.read_text()
    ada.config.unlink()
    with ada.here():
        (ada.folder / "text.jsonl").write_bytes((ada.folder / "rows.jsonl").read_bytes())
        assert main(init) == 0
    assert load(ada.config).strategy.name == "fedkseed"
    ada.config.write_text(written)
    ada.do(*charter[1:])
    shared = (ada.folder / "charter.json").read_bytes()
    for person in (bob, eve):
        (person.folder / "charter.json").write_bytes(shared)
    for person in (ada, bob):
        person.change('listen = ""', f'listen = "{places[person]}"')
    for person in (ada, bob, eve):
        person.change("records = 0", "records = 2")
    ((run),) = commands("Take part")
    ask, introduce = commands("Join later")
    processes = [start(person, *run[1:]) for person in (ada, bob)]
    try:
        eventually(lambda: status(ada).get("records") == 4 == status(bob).get("records"))
        eve.do(*ask[1:])
        (ada.folder / "join.request").write_bytes((eve.folder / "join.request").read_bytes())
        ada.do(*introduce[1:])
        processes.append(start(eve, *run[1:]))
        eventually(lambda: all(status(p).get("records") == 6 for p in (ada, bob, eve)))
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        ends = [process.wait() for process in processes]
    assert ends == [0, 0, 0], [log_of(person)[-2000:] for person in (ada, bob, eve)]
    assert len({status(person)["state"] for person in (ada, bob, eve)}) == 1
    files = [adapter_bytes(person.folder / "peers" / "run") for person in (ada, bob, eve)]
    assert files[0] == files[1] == files[2]
    for command in commands("Look back"):
        said = [base_of(ada) if word == "nano" else word for word in command[1:]]
        said = [key_of(bob).hex()[:6] if word == "3f9a2c" else word for word in said]
        ada.do(*said)
    replayed = {path.name: path.read_bytes() for path in (ada.folder / "adapter").iterdir()}
    assert replayed == files[0]
