"""`meadow client …` at a participant's keyboard, before a gateway that really listens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateways import Quick, Site, site
from homes import own_rows, terms_json

from meadow.cli import main
from meadow.client import daemon as client_daemon
from meadow.client import joining
from meadow.client.home import LOCK, OUTGOING, PAUSED, POLICY, TERMS
from meadow.client.membership import Membership
from meadow.client.outgoing_log import OutgoingLog
from meadow.client.policy import Policy
from meadow.client.resident_trainer import ResidentTrainer
from meadow.client.trainer_socket import TrainerSocket
from meadow.config import Config
from meadow.flower_commands import bundle_digest
from meadow.identity import HOME, own_identity
from meadow.store import locked

Failure = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A coordinator with a run, whose bundle is the one that this machine builds."""
    bundle = tmp_path / "bundle.fab"
    bundle.write_bytes(b"entry points")
    monkeypatch.setattr(client_daemon, "bundle_in", lambda folder, disk: bundle)
    monkeypatch.setattr(joining, "ASK_SECONDS", 0.02)
    with site(tmp_path / "c") as place:
        terms = terms_json(tiny, bundle=bundle_digest(bundle))
        (place.folder / "terms.json").write_bytes(terms)
        yield place


@pytest.fixture
def ada(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ada works; her text is `rows.jsonl`."""
    folder = tmp_path / "ada"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(own_rows(Path(tiny.data.source), "ada"))
    monkeypatch.setenv(HOME, str(tmp_path / "h"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Failure:
    """The one line that a mistaken command prints."""

    def fail(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["client", *map(str, arguments)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("meadow: ")
        return last

    return fail


def do(*arguments: str | Path) -> Any:
    """Run `meadow client`; what it reports."""
    assert main(["client", *map(str, arguments), "--json", "report.json"]) == 0
    return json.loads(Path("report.json").read_text())


def approving(place: Site, name: str) -> threading.Thread:
    """The operator, who approves once somebody waits."""

    def approve() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            person = place.roster.by_name(name)
            if person is not None and person.status == "pending":
                place.roster.approve(name, 7)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=approve)
    thread.start()
    return thread


def join(place: Site, *more: str) -> Path:
    """Joined as ada, by a real enrolment; the folder."""
    operator = approving(place, "ada")
    report = do("join", place.invite("ada").text(), "--data", "rows.jsonl", *more)
    operator.join()
    return Path(report["folder"])


def test_joining_shows_what_will_happen_and_asks(
    place: Site, ada: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def yes(question: str) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    folder = join(place)
    printed = capsys.readouterr().out
    known = place.roster.by_name("ada")
    assert known is not None and known.fingerprint in printed and len(asked) == 1
    assert known.key == own_identity().public.public_bytes_raw()
    for words in ("6 rows to train on, 2 held out", "a round", "never leaves", str(folder)):
        assert words in printed
    rules, membership = Policy.load(folder / POLICY), Membership.load(folder)
    assert rules.terms == membership.terms and rules.data == [str(ada / "rows.jsonl")]
    assert membership.node_id == "7" and membership.lifetime()[1] > time.time()
    assert folder.stat().st_mode & 0o777 == 0o700
    with ResidentTrainer(folder):
        pass  # what was agreed to is what it takes


@pytest.mark.parametrize("answer", ["", "n", "no", "yess"])
def test_without_a_yes_nothing_will_be_trained_and_the_command_can_be_repeated(
    place: Site, ada: Path, failure: Failure, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    word = place.invite("ada").text()
    operator = approving(place, "ada")
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert "not agreed to" in failure("join", word, "--data", "rows.jsonl")
    operator.join()
    folder = joining.folder_of("ada")
    assert not (folder / TERMS).exists() and not (folder / POLICY).exists()
    assert "there is no" in failure()
    do("join", word, "--data", "rows.jsonl", "--yes")
    assert (folder / TERMS).exists()
    assert do("agree", "--yes")["folder"] == str(folder)


def test_mistakes_in_joining_are_one_line(
    place: Site, ada: Path, failure: Failure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    word = place.invite("ada").text()

    def nobody(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert "cut off" in failure("join", word[:100], "--data", "rows.jsonl")
    assert "is not an invitation" in failure("join", "hello", "--data", "rows.jsonl")
    assert "no text at" in failure("join", word, "--data", "missing.jsonl")
    assert place.roster.by_name("ada").status == "invited"  # type: ignore[union-attr]
    place.invite("ada")  # another one takes its place
    assert "unknown or was replaced" in failure("join", word, "--data", "rows.jsonl", "--yes")
    word = place.invite("ada").text()
    (ada / "invitation.txt").write_text(f"{word[:70]}\n  {word[70:]}\n")  # as mail arrives
    operator = approving(place, "ada")
    assert "nobody is there to be asked (--yes" in failure(
        "join", "invitation.txt", "--data", "rows.jsonl"
    )
    operator.join()
    (ada / "empty.jsonl").touch()
    assert "no rows in" in failure("join", word, "--data", "empty.jsonl", "--yes")
    assert "--base" in failure("join", word, "--data", "rows.jsonl", "--base", "nano", "--yes")
    again = place.invite("eve").text()
    folder = joining.folder_of("ada")
    assert "is ada's already" in failure("join", again, "--data", "rows.jsonl", "--folder", folder)
    place.stop()
    assert "cannot be reached" in failure("join", word, "--data", "rows.jsonl", "--yes")
    place.move()


def test_an_invitation_that_was_used_by_another_key_is_refused(
    place: Site, ada: Path, failure: Failure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    word = place.invite("ada").text()
    operator = approving(place, "ada")
    do("join", word, "--data", "rows.jsonl", "--yes")
    operator.join()
    monkeypatch.setenv(HOME, str(tmp_path / "thief"))
    assert "used already" in failure("join", word, "--data", "rows.jsonl", "--yes")


def test_another_bundle_is_refused_before_anything_is_agreed_to(
    place: Site, ada: Path, tiny: Config, failure: Failure
) -> None:
    (place.folder / "terms.json").write_bytes(terms_json(tiny, bundle="ab" * 32))
    word, operator = place.invite("ada").text(), approving(place, "ada")
    assert "so it is refused" in failure("join", word, "--data", "rows.jsonl", "--yes")
    operator.join()
    assert not (joining.folder_of("ada") / TERMS).exists()


# --- a member's commands -------------------------------------------------------------------------


@pytest.fixture
def folder(place: Site, ada: Path) -> Path:
    return join(place, "--yes")


def test_status_without_and_with_a_trainer(
    folder: Path, capsys: pytest.CaptureFixture[str], failure: Failure
) -> None:
    found = do("status")
    assert not found["daemon"] and "is not running" in capsys.readouterr().out
    assert "daemon is not running (`meadow client` starts it)" in failure("dry-run")
    with (
        locked(folder / LOCK, ""),
        ResidentTrainer(folder) as trainer,
        TrainerSocket(folder / "trainer.sock", trainer.handle),
    ):
        dry = do("dry-run")
        capsys.readouterr()
        assert do("status")["recent"][0]["verb"] == "dry-run"
    printed = capsys.readouterr().out
    assert "waiting for a round" in printed and "6 rows to train on" in printed
    assert dry["bytes"] > 0 and dry["refusal"] == ""
    assert do("log") == []  # a dry run sends nothing


def test_pause_and_resume(folder: Path) -> None:
    for _ in range(2):
        assert do("pause") == {"paused": True} and (folder / PAUSED).exists()
    assert do("status")["paused"]
    for _ in range(2):
        assert do("resume") == {"paused": False} and not (folder / PAUSED).exists()


def test_the_log_is_shown_and_a_change_in_it_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str], failure: Failure
) -> None:
    log = OutgoingLog(folder / OUTGOING, Quick())
    for number in range(1, 4):
        log.append("train", b"x" * number, run="ab", round=number, received=1, about={})
    assert [entry["bytes"] for entry in do("log", "--last", "2")] == [1, 2, 3]
    printed = capsys.readouterr().out
    assert "3 lines, 6 B: the chain holds" in printed and printed.count("train") == 2
    changed = (folder / OUTGOING).read_text().replace('"round":2', '"round":9')
    (folder / OUTGOING).write_text(changed)
    assert "was changed" in failure("log")
    (folder / OUTGOING).unlink()
    assert "outgoing.jsonl is missing" in failure("log")
    with pytest.raises(SystemExit):
        main(["client", "log", "--last", "0"])


def test_the_wrong_folder_is_said_to_be_one_by_every_command(
    ada: Path, failure: Failure, tmp_path: Path
) -> None:
    for command in ("run", "status", "pause", "resume", "log", "dry-run", "leave", "agree",
                    "rotate-key", "service"):  # fmt: skip
        assert "is no participant's folder" in failure(command, "--folder", tmp_path / "nope")
        assert "joined no run" in failure(command)
    assert not (tmp_path / "nope").exists()


def test_a_new_key_keeps_the_name(place: Site, folder: Path) -> None:
    before = own_identity().key_id
    report = do("rotate-key")
    known = place.roster.by_name("ada")
    assert known is not None and known.fingerprint == report["fingerprint"]
    assert own_identity().key_id != before
    do("agree", "--yes")  # the new certificate opens the gateway


def test_leaving_tells_the_coordinator_and_keeps_the_log(
    place: Site, folder: Path, failure: Failure
) -> None:
    OutgoingLog(folder / OUTGOING, Quick())
    with locked(folder / LOCK, ""):
        assert "daemon is running (stop it" in failure("leave", "--withdraw")
    assert not [note for note in place.roster.notes() if note.kind == "withdraw"]
    place.stop()
    assert "cannot be reached" in failure("leave", "--withdraw")
    place.move(place.address)
    assert do("leave", "--withdraw")["withdrawn"]
    assert [note.name for note in place.roster.notes() if note.kind == "withdraw"] == ["ada"]
    assert sorted(path.name for path in folder.iterdir()) == [OUTGOING]
    assert "joined no run" in failure("status")
    assert do("log", "--folder", folder) == []


def test_the_unit_names_this_machines_paths(folder: Path, ada: Path) -> None:
    text = do("service", "--memory-mb", "2000", "--out", "meadow.service")["unit"]
    assert f"ReadWritePaths={folder}" in text and "MemoryMax=2000M" in text
    assert f"ReadOnlyPaths={ada / 'rows.jsonl'}\n" in text
    assert Path("meadow.service").read_text() == text
    rules = Policy.load(folder / POLICY)
    Policy(data=["nano", f"{ada}/**/*.jsonl"], terms=rules.terms).save(folder / POLICY, Quick())
    lines = do("service")["unit"].splitlines()
    assert [x for x in lines if x.startswith("ReadOnlyPaths")] == [f"ReadOnlyPaths={ada}"]
