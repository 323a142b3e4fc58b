"""Flower's client process: imports no torch, knows two verbs, leaves the work to the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from meadow.client.app import app
from meadow.client.trainer_socket import TrainerSocket
from meadow.errors import PolicyError
from meadow.simulation import flower_identity

HEAVY = ("torch", "transformers", "peft", "datasets")


@pytest.fixture(autouse=True)
def identity() -> None:
    flower_identity.assume()


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ada"
    folder.mkdir(mode=0o700)

    def handle(verb: str, body: bytes, wanted: object) -> bytes:
        if body == b"no":
            raise PolicyError("it is outside the hours", "22:00-06:00")
        return verb.encode() + b" of " + body

    with TrainerSocket(folder / "trainer.sock", handle):
        yield folder / "trainer.sock"


def ask(payload: object, kind: str = "train", **node_config: str) -> Message:
    content = RecordDict({"meadow": ConfigRecord({"payload": payload})})  # type: ignore[dict-item]
    return call(Message(content, dst_node_id=1, message_type=kind), **node_config)


def call(message: Message, **node_config: str) -> Message:
    context = Context(1, 1, dict(node_config), RecordDict(), {})
    flower_identity.name_message(message.metadata, "m1")
    return app(message, context)


def test_it_imports_no_torch() -> None:
    code = f"import sys, meadow.client.app; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_trainer_answers(socket: Path, kind: str) -> None:
    reply = ask(b"\x00x", kind, trainer=str(socket))
    assert reply.content["meadow"]["payload"] == kind.encode() + b" of \x00x"


def test_a_refusal_is_an_error_reply_with_its_reason(socket: Path) -> None:
    reply = ask(b"no", trainer=str(socket))
    assert reply.has_error() and reply.error.code == 100
    assert reply.error.reason == "it is outside the hours (22:00-06:00)"


@pytest.mark.parametrize("payload", [b"x", b"no"])
@pytest.mark.parametrize("days", [-1, 0, 1])
def test_a_reply_is_valid_as_long_as_its_message(socket: Path, payload: bytes, days: int) -> None:
    """Whatever this machine's clock says against the sender's."""
    content = RecordDict({"meadow": ConfigRecord({"payload": payload})})
    message = Message(content, dst_node_id=1, message_type="train", ttl=600.0)
    message.metadata.created_at -= 86_400 * days
    reply = call(message, trainer=str(socket)).metadata
    assert (reply.created_at, reply.ttl) == (message.metadata.created_at, 600.0)


def test_a_node_without_a_trainer() -> None:
    assert str(ask(b"x").error.reason).startswith("this node has no trainer")


@pytest.mark.parametrize("kind", ["query", "train.other", "evaluate.x"])
def test_there_is_no_third_verb(socket: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="No .* function registered"):
        ask(b"x", kind, trainer=str(socket))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"meadow": ConfigRecord({"payload": 7})}),
        RecordDict({"meadow": MetricRecord({"payload": 7})}),
        RecordDict({"other": ConfigRecord({"payload": b"x"})}),
    ],
)
def test_a_message_without_payload_is_the_trainers_to_refuse(
    socket: Path, content: RecordDict
) -> None:
    reply = call(Message(content, dst_node_id=1, message_type="train"), trainer=str(socket))
    assert reply.content["meadow"]["payload"] == b"train of "
