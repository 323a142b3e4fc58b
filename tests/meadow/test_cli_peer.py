"""`meadow peer …` over a tiny base: the pages' commands, and one clear line for every mistake."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from tiny import save_base, write_rows
from tiny_peers import adapter_bytes, eventually

from meadow.cli import main
from meadow.client.peer_terms import CHARTERED, terms_of
from meadow.client.peer_tls import certificate_of
from meadow.config import Config, load, write
from meadow.identity import HOME, Identity
from meadow.server.registry import Registry, default_folder
from meadow.strategies.introductions import JoinRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


class Person:
    """One user: a home, a folder, a run.toml."""

    def __init__(self, folder: Path, base: Path, **peer: Any) -> None:
        folder.mkdir()
        self.folder, self.config = folder, folder / "run.toml"
        write_rows(folder / "rows.jsonl")
        config = Config().replace(
            model={"base": str(base), "rank": 4, "alpha": 4.0, "device": "cpu"},
            data={"source": "rows.jsonl", "max_length": 32},
            strategy={"name": "fedkseed", "options": {"scale": -6}},
            clients={"batch": 2},
            simulation={"threads": 1},
            peer={"steps": 2, "lr": 1e-3, "sync_seconds": 0.05, **peer},
        )
        self.config.write_text(write(config))

    def change(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    @property
    def identity(self) -> Identity:
        return Identity.load_or_create(self.folder / "home" / "identity.pem")

    @contextmanager
    def here(self) -> Iterator[None]:
        """At this user's keyboard."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(HOME, str(self.folder / "home"))
            patch.chdir(self.folder)
            yield

    def do(self, *arguments: str | Path) -> dict[str, Any]:
        """Run `meadow peer` with these arguments; what it reports."""
        with self.here():
            assert main(["peer", *map(str, arguments), "--json", "report.json"]) == 0
            report: dict[str, Any] = json.loads(Path("report.json").read_text())
        return report

    def work(self, out: str = "peer") -> dict[str, Any]:
        """`meadow peer run` until its records are made, then Ctrl-C."""
        log = self.folder / out / "events.jsonl"
        done = threading.Event()

        def interrupt() -> None:
            eventually(lambda: done.is_set() or log.exists() and "only gossips" in log.read_text())
            if not done.is_set():
                os.kill(os.getpid(), signal.SIGINT)

        log.unlink(missing_ok=True)
        person = threading.Thread(target=interrupt)
        person.start()
        try:
            return self.do("run", "run.toml", "--out", out)
        finally:
            done.set()
            person.join()

    def fails(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
        """The one line that a mistaken command prints."""
        capsys.readouterr()
        with self.here():
            assert main(["peer", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        *progress, last = printed.err.strip().splitlines()
        assert last.startswith("meadow: ") and "Traceback" not in printed.err
        assert all(line.endswith(" ...") for line in progress), progress
        return last


@pytest.fixture
def ada(tmp_path: Path, base: Path) -> Person:
    return Person(tmp_path / "ada", base, participant="ada", records=1)


@pytest.fixture
def bob(tmp_path: Path, base: Path) -> Person:
    return Person(tmp_path / "bob", base, participant="bob", records=1)


@pytest.fixture
def worked(ada: Person) -> Person:
    """Ada has founded a run and made a record."""
    ada.do("charter", "run.toml")
    ada.work()
    return ada


def test_a_run_from_its_founding_to_a_look_back(ada: Person, bob: Person) -> None:
    card = bob.do("card", "--address", "127.0.0.1:7070", "--out", "bob.card")
    assert (card["key"], card["address"]) == (key_of(bob).hex(), "127.0.0.1:7070")
    founded = ada.do("charter", "run.toml", "--founder", bob.folder / "bob.card")
    assert sorted(founded["founders"]) == sorted([key_of(ada).hex(), key_of(bob).hex()])
    report = ada.work()
    assert report["own_records"] == report["records"] == 1 and report["members"] == 2
    assert report["folder"] == "peer" and report["truncated"] == 0
    shown = json.loads((ada.folder / "peer" / "status.json").read_text())
    assert shown["state"] == report["state"]
    out = ada.folder / "again"
    replayed = ada.do("replay", "peer", "--base", base_of(ada), "--out", out, "--state",
                      report["state"][:12])  # fmt: skip
    assert (replayed["state"], replayed["records"], replayed["steps"]) == (report["state"], 1, 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == adapter_bytes(
        ada.folder / "peer"
    )
    without = ada.do("replay", "peer", "--base", base_of(ada), "--without", key_of(ada).hex()[:6])
    assert without["records"] == 0 and without["state"] != report["state"]
    verified = ada.do("verify", "run.toml", "--folder", "peer", "--records", "2")
    assert verified["records"] == [{"sequence": 0, "steps": 2, "equal": 2, "worst": 0}]
    assert ada.work()["own_records"] == 1, "the same command goes on"


def test_what_a_ledger_adds_up_to_is_published(worked: Person) -> None:
    replay = ("replay", "peer", "--base", base_of(worked))
    told = worked.do(*replay, "--publish", "letters")
    assert told["published"] == "letters@v1"
    assert worked.do(*replay, "--publish", "letters")["published"] == "letters@v1", "the same one"
    with worked.here(), Registry.open(default_folder(), worked.identity) as registry:
        version = registry.resolve("letters@prod")
        assert str(version) == "letters@v1" and version.facts["rounds"] == 1
        assert registry.verify(version).rank == 8, "the least that servers take"
        published = safetensors.torch.load(registry.files(version).weights)
    own = load_file(worked.folder / "peer" / "adapter" / "adapter_model.safetensors")
    assert own.keys() == published.keys()
    assert all(torch.equal(own[name], published[name]) for name in own)


def key_of(person: Person) -> bytes:
    return certificate_of(person.identity).peer


def base_of(person: Person) -> str:
    return load(person.config).model.base


def test_a_joiner_asks_and_a_member_introduces_it(
    worked: Person, bob: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    (bob.folder / "charter.json").write_bytes((worked.folder / "charter.json").read_bytes())
    asked = bob.do("join", "run.toml", "--out", "bob.request")
    told = worked.do("introduce", bob.folder / "bob.request", "--folder", "peer")
    assert told["peer"] == asked["peer"] and told["introducer"] == key_of(worked).hex()
    (dropped,) = (worked.folder / "peer" / "inbox").iterdir()
    assert dropped.name == f"{asked['peer']}.introduction"
    worked.change("records = 1", "records = 2")
    assert worked.work()["members"] == 2
    assert list((worked.folder / "peer" / "inbox").iterdir()) == []


def test_the_printed_retraction_says_what_it_is_not(
    worked: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    worked.do("replay", "peer", "--base", base_of(worked), "--without", key_of(worked).hex())
    assert "not exact unlearning" in capsys.readouterr().out


def test_a_run_of_other_layers_is_replayed_by_its_charter(ada: Person) -> None:
    ada.change('targets = ["all-linear"]', 'targets = ["q_proj", "up_proj"]')
    ada.do("charter", "run.toml")
    state = ada.work()["state"]
    assert ada.do("replay", "peer", "--base", base_of(ada))["state"] == state


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "fedkseed"', 'name = "fedavg_lora"', "run fedkseed, not fedavg_lora"),
        ('name = "fedkseed"', 'name = "fedkseed"\nmomentum = 0.5', "needs a coordinator"),
        ('name = "fedkseed"', 'name = "fedkseed"\nmomentom = 0.5', "did you mean 'momentum'?"),
        ("lr = 0.001", "lr = 10.0", "would need a shift"),
        ('listen = ""', 'listen = "0.0.0.0:7070"', "no address that others can call"),
        ('listen = ""', 'listen = "somewhere"', "is no address"),
        ('address = ""', 'address = "ada.example.org:7070"', "nothing listens"),
        ('targets = ["all-linear"]', 'targets = ["query"]', "match no linear layer"),
    ],
)
def test_mistakes_of_a_founder_are_one_line(
    ada: Person, capsys: pytest.CaptureFixture[str], old: str, new: str, says: str
) -> None:
    ada.change(old, new)
    assert says in ada.fails(capsys, "charter", "run.toml")
    assert not (ada.folder / "charter.json").exists()


def test_cards_that_are_none_and_a_charter_that_is_there_are_refused(
    ada: Person, bob: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    charter = ("charter", "run.toml", "--founder", "other.card")
    card = ada.folder / "other.card"
    assert "`meadow peer card` writes one" in ada.fails(capsys, *charter)
    for junk in (b"", b"{}", b"[1]", b'{"key": "zz", "certificate": "", "address": ""}', b"\xff"):
        card.write_bytes(junk)
        assert "other.card is no card" in ada.fails(capsys, *charter)
    fields = bob.do("card")
    card.write_text(json.dumps(fields | {"key": key_of(ada).hex()}))
    assert "TLS certificate of peer" in ada.fails(capsys, *charter)
    card.write_text(json.dumps(fields | {"address": "nowhere"}))
    assert "is no address" in ada.fails(capsys, *charter)
    card.write_text(json.dumps(fields | {"address": "http://bob:7070"}))
    assert "'http://bob:7070' is not an address" in ada.fails(capsys, *charter)
    assert "is not an address" in bob.fails(capsys, "card", "--address", "http://bob:7070")
    ada.do("charter", "run.toml")
    assert "charter.json exists" in ada.fails(capsys, "charter", "run.toml")


def test_mistakes_of_a_peer_are_one_line(
    ada: Person, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ("run", "run.toml", "--out", "peer")
    assert "`meadow init` writes one" in ada.fails(capsys, "run", "none.toml")
    assert "one of the run's founders has it" in ada.fails(capsys, *run)
    ada.do("charter", "run.toml")
    charter = ada.folder / "charter.json"
    good = charter.read_bytes()
    for junk, says in ((b"{}", "not a charter"), (b"", "not a charter"),
                       (good.replace(b'"sig":"', b'"sig":"AAAA'), "does not hold")):  # fmt: skip
        charter.write_bytes(junk)
        assert says in ada.fails(capsys, *run)
    charter.write_bytes(good)
    for old, new, says in (
        ("rank = 4", "rank = 2", "in the charter"),
        ('participant = "ada"', 'participant = "zoe"', "known: ada, bob, eve"),
        ('targets = ["all-linear"]', 'targets = ["q_proj"]', "adapts other layers"),
        ('listen = ""', 'listen = "127.0.0.1:99999"', "names no port"),
    ):
        ada.change(old, new)
        assert says in ada.fails(capsys, *run)
        ada.change(new, old)
    assert not (ada.folder / "peer" / "adapter").exists()


def test_another_base_is_one_line(
    worked: Person, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_base(tmp_path / "other") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    replay = ("replay", "peer", "--base")
    assert "about another base" in worked.fails(capsys, *replay, tmp_path / "other")
    assert "nowhere" in worked.fails(capsys, *replay, "./nowhere")
    worked.change(f'base = "{base_of(worked)}"', f'base = "{tmp_path / "other"}"')
    assert "about another base" in worked.fails(capsys, "run", "run.toml", "--out", "peer")


def test_a_folder_of_another_peer_run_or_process_is_one_line(
    worked: Person, bob: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    place = worked.folder / "peer"
    (bob.folder / "charter.json").write_bytes((worked.folder / "charter.json").read_bytes())
    assert "belongs to another peer" in bob.fails(capsys, "run", "run.toml", "--out", place)
    assert "is the folder of peer" in bob.fails(capsys, "verify", "run.toml", "--folder", place)
    with (place / "records.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for command in (("run", "run.toml", "--out", "peer"),
                        ("verify", "run.toml", "--folder", "peer"),
                        ("replay", "peer", "--base", base_of(worked))):  # fmt: skip
            assert "another process is working" in worked.fails(capsys, *command)
    (worked.folder / "charter.json").unlink()
    worked.do("charter", "run.toml")
    assert "holds another run" in worked.fails(capsys, "run", "run.toml", "--out", "peer")
    assert worked.do("replay", "peer", "--base", base_of(worked))["records"] == 1, "unharmed"


def test_mistakes_of_joining_are_one_line(
    worked: Person, bob: Person, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    introduce = ("introduce", tmp_path / "bob.request", "--folder", "peer")
    assert "`meadow peer join` writes one" in worked.fails(capsys, *introduce)
    assert "one of the run's founders" in bob.fails(capsys, "join", "run.toml")
    assert "a founder of the run" in worked.fails(capsys, "join", "run.toml")
    bob.do("charter", "run.toml")
    run = json.loads((bob.folder / "report.json").read_text())["run"]
    joe = Identity(Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\x07"))
    other = JoinRequest.sign(joe, bytes.fromhex(run), certificate_of(joe).der, "")
    for junk in (b"", b"\x01", other.encoded, other.encoded[:-1], b"\x02" + other.encoded[1:]):
        (tmp_path / "bob.request").write_bytes(junk)
        assert "a request to join" in worked.fails(capsys, *introduce)
    assert "holds no records" in worked.fails(
        capsys, "introduce", tmp_path / "bob.request", "--folder", "nowhere"
    )
    assert "is the folder of peer" in bob.fails(
        capsys, "introduce", tmp_path / "bob.request", "--folder", worked.folder / "peer"
    )
    assert list((worked.folder / "peer" / "inbox").iterdir()) == []


def test_mistakes_of_looking_back_are_one_line(
    worked: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = ("replay", "peer", "--base", base_of(worked))
    for name in ("ffffffff", "abc", ""):
        assert "first digits of one member's key" in worked.fails(
            capsys, *replay, "--without", name
        )
    assert "add up to state" in worked.fails(capsys, *replay, "--state", "00ff")
    nowhere = worked.fails(capsys, "replay", "nowhere", "--base", base_of(worked))
    assert "name the folder of a peer" in nowhere
    (worked.folder / "peer" / "events.jsonl").write_text("")
    assert "events.jsonl must be kept" in worked.fails(
        capsys, "verify", "run.toml", "--folder", "peer"
    )
    with worked.here(), pytest.raises(SystemExit) as ended:
        main(["peer", "verify", "run.toml", "--folder", "peer", "--records", "0"])
    assert ended.value.code == 2


def test_init_writes_what_peers_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "run.toml", "--peer"]) == 0
    config = load(tmp_path / "run.toml")
    assert config.strategy.name == "fedkseed" and {*config.strategy.options} == {*CHARTERED}
    assert terms_of(config).unit == config.strategy.options["unit"]


# --- ending it -----------------------------------------------------------------------------------


def start(person: Person, *arguments: str) -> subprocess.Popen[bytes]:
    """The command as a process, as a user has it."""
    environment = {**os.environ, HOME: str(person.folder / "home"), "OMP_NUM_THREADS": "1"}
    with (person.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "meadow.cli", "peer", *arguments],
            cwd=person.folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip


def log_of(person: Person) -> str:
    return (person.folder / "log.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_record_ends_after_it_and_two_at_once(
    ada: Person, number: signal.Signals
) -> None:
    ada.do("charter", "run.toml")
    ada.change("steps = 2", "steps = 1000")
    ada.change("records = 1", "records = 0")
    process = start(ada, "run", "run.toml", "--out", "peer")
    eventually(lambda: "training and gossiping" in log_of(ada))
    process.send_signal(number)
    eventually(lambda: "ending after the record" in log_of(ada))
    assert process.wait() == 0
    shown = json.loads((ada.folder / "peer" / "status.json").read_text())
    assert ada.do("replay", "peer", "--base", base_of(ada))["state"] == shown["state"]
    ada.change("steps = 1000", "steps = 999")
    (ada.folder / "log.txt").unlink()
    process = start(ada, "run", "run.toml", "--out", "peer")
    eventually(lambda: "training and gossiping" in log_of(ada))
    process.send_signal(number)
    eventually(lambda: "ending after the record" in log_of(ada))
    process.send_signal(number)
    assert process.wait() in (0, 130, -number)
    assert "Traceback" not in log_of(ada)
    assert ada.do("replay", "peer", "--base", base_of(ada))["records"] >= shown["records"]


# --- docs/how-to-peers.md ------------------------------------------------------------------------


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


def status(person: Person) -> dict[str, Any]:
    path = person.folder / "peers" / "run" / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
