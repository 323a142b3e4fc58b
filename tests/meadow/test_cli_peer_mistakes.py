"""`meadow peer …`: one clear line for every mistake."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peer_person import Person, base_of, key_of
from safetensors.torch import load_file, save_file
from tiny import save_base

from meadow.cli import main
from meadow.client.peer_tls import certificate_of
from meadow.identity import Identity
from meadow.strategies.introductions import JoinRequest

pytest_plugins = ("peer_person_fixtures",)


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
