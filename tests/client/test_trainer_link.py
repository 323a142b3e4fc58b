"""The socket between Flower's client process and the trainer: who may ask, and what gets lost."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meadow import wire
from meadow.client import trainer_link
from meadow.client.peer_net import grpc
from meadow.client.trainer_link import LARGEST, TrainerLink, target
from meadow.client.trainer_socket import TrainerSocket
from meadow.client.work_limits import Stopping
from meadow.errors import ConfigError, IdentityError, PolicyError, TrainerError

Act = Callable[[str, bytes], bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "ada é %41"
    folder.mkdir(mode=0o700)
    return folder / "trainer.sock"


def serving(path: Path, act: Act) -> TrainerSocket:
    return TrainerSocket(path, lambda verb, body, wanted: act(verb, body), grace=1.0)


@pytest.fixture
def link(path: Path) -> Iterator[TrainerLink]:
    with TrainerLink(path, patience=20) as one:
        yield one


_HELD = """
import sys
from pathlib import Path
from meadow.client.trainer_socket import TrainerSocket
with TrainerSocket(Path(sys.argv[1]), lambda verb, body, wanted: b"held: " + body):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_trainer(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that listens, and that the system does not let run."""
    command = [sys.executable, "-c", _HELD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def fail(error: Exception) -> Act:
    def act(verb: str, body: bytes) -> bytes:
        raise error

    return act


def test_verb_and_bytes_arrive_and_come_back(path: Path, link: TrainerLink) -> None:
    with serving(path, lambda verb, body: verb.encode() + body[::-1]):
        assert link.call("dry-run", b"\x00\xff") == b"dry-run\xff\x00"
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_message_larger_than_grpcs_own_limit(path: Path, link: TrainerLink) -> None:
    large = bytes(9 * 2**20)
    with serving(path, lambda verb, body: body + b"!"):
        assert link.call("train", large) == large + b"!"
    assert LARGEST == wire.LARGEST  # what a message of a run can have at most


def test_a_refusal_is_told_once(path: Path, link: TrainerLink) -> None:
    asked = []

    def act(verb: str, body: bytes) -> bytes:
        asked.append(verb)
        raise PolicyError("too many steps é", "at most 3 here")

    with serving(path, act), pytest.raises(TrainerError) as caught:
        link.call("train")
    assert str(caught.value) == "too many steps é (at most 3 here)" and asked == ["train"]


def test_a_defect_is_not_asked_again_and_keeps_its_text(path: Path, link: TrainerLink) -> None:
    asked = []

    def act(verb: str, body: bytes) -> bytes:
        asked.append(verb)
        raise KeyError("private")

    with serving(path, act), pytest.raises(TrainerError, match="met a defect") as caught:
        link.call("train")
    assert "private" not in str(caught.value) and len(asked) == 1


@pytest.mark.parametrize("name", ["/meadow.Trainer/UPPER", "/meadow.Trainer/", "/other/train"])
def test_what_can_be_no_verb(path: Path, name: str) -> None:
    with serving(path, lambda verb, body: b""), grpc.insecure_channel(target(path)) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(name)
        with pytest.raises(grpc.RpcError) as caught:
            method(b"", timeout=20)
        assert "UNIMPLEMENTED" in str(caught.value)


def test_nobody_there(path: Path) -> None:
    with TrainerLink(path, patience=0.0) as link, pytest.raises(TrainerError, match="not running"):
        link.call("status")


def test_it_waits_for_a_trainer_that_starts_later(path: Path, link: TrainerLink) -> None:
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(link.call("train", b"x")))
    thread.start()
    thread.join(0.3)
    with serving(path, lambda verb, body: body * 2):
        thread.join(20)
    assert answers == [b"xx"]


def test_a_trainer_that_is_held_still_is_waited_for(path: Path, link: TrainerLink) -> None:
    """As by a machine that swaps, or a laptop's lid: it is neither away nor has it ended."""
    with held_trainer(path) as process:
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(link.call("train", b"x")))
        thread.start()
        thread.join(trainer_link._WORKED + 1.0)
        assert answers == []
        process.send_signal(signal.SIGCONT)
        thread.join(20)
        assert answers == [b"held: x"]


def test_a_trainer_that_stops_is_asked_again_when_it_is_back(path: Path, link: TrainerLink) -> None:
    answers: list[bytes] = []
    asked = threading.Event()

    def stopping(verb: str, body: bytes) -> bytes:
        asked.set()
        raise Stopping("the trainer is stopping")

    thread = threading.Thread(target=lambda: answers.append(link.call("train", b"x")))
    with serving(path, stopping):
        thread.start()
        assert asked.wait(20)
    with serving(path, lambda verb, body: b"done"):
        thread.join(20)
    assert answers == [b"done"]


def test_a_trainer_that_dies_of_a_request_is_not_fed_it_for_ever(path: Path) -> None:
    """Each call lasts, by this clock, long enough to have been work."""
    hours = iter(range(0, 10**6, 3600))
    with (
        serving(path, fail(Stopping("gone"))),
        TrainerLink(path, patience=1e9, clock=lambda: next(hours)) as link,
        pytest.raises(TrainerError, match="ended 3 times over one request"),
    ):
        link.call("train")


def test_a_caller_that_has_gone_is_known(path: Path) -> None:
    at_work, gone = threading.Event(), threading.Event()

    def act(verb: str, body: bytes, wanted: Callable[[], bool]) -> bytes:
        at_work.set()
        while wanted():
            gone.wait(0.01)
        gone.set()
        return b""

    with TrainerSocket(path, act), grpc.insecure_channel(target(path)) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        method = channel.unary_unary("/meadow.Trainer/train")
        call = method.future(b"")
        assert at_work.wait(20)
        call.cancel()
        assert gone.wait(20)


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_folder_that_is_open_to_others(path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    with pytest.raises(IdentityError, match="chmod 700"):
        serving(path, lambda verb, body: b"")


def test_a_socket_of_an_ended_trainer_is_taken_over(path: Path, link: TrainerLink) -> None:
    for answer in (b"one", b"two"):
        with serving(path, lambda verb, body, answer=answer: answer):  # type: ignore[misc]
            assert link.call("status") == answer


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set MEADOW_HOME to a folder with a shorter name"):
        target(tmp_path / ("x" * 108))
