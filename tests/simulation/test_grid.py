"""LocalGrid, ServerApp's peers and ClientApp together, over Flower's own messages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from meadow.client.app import build
from meadow.errors import DataError, StorageError, UpdateError
from meadow.server.app import GridPeers, wrap
from meadow.server.app import build as build_server_app
from meadow.server.coordinator import Refusal
from meadow.server.late_answers import Late
from meadow.simulation.grid import LocalGrid

NAMES = ("ada", "bob", "eve")


class Person:
    """Stands for a member: notes what it was asked."""

    def __init__(self, name: str, act: Callable[[bytes], bytes] | None = None) -> None:
        self.name, self.asked, self.act = name, list[bytes](), act

    def work(self, payload: bytes) -> bytes:
        self.asked.append(payload)
        return self.act(payload) if self.act else self.name.encode() + b" did " + payload

    def evaluate(self, payload: bytes) -> bytes:
        return self.name.encode() + b" measured " + payload


def federation(
    *acts: Callable[[bytes], bytes] | None, group: int = 1
) -> tuple[LocalGrid, list[Person]]:
    acts = acts + (None,) * (3 - len(acts))
    people = [Person(name, act) for name, act in zip(NAMES, acts, strict=True)]
    return LocalGrid(build(lambda node: people[node - 1]), 3, group), people  # type: ignore[arg-type, return-value]


NODES = {name: node for node, name in enumerate(NAMES, 1)}


def peers_of(grid: Grid) -> GridPeers:
    return GridPeers(grid, lambda: NODES, lambda cohort: [[name] for name in cohort])


def to(node: int, payload: bytes, kind: str = "train") -> Message:
    return Message(wrap(payload), dst_node_id=node, message_type=kind)


def payload_of(message: Message) -> object:
    return message.content["meadow"]["payload"]


def fail(error: Exception) -> Callable[[bytes], bytes]:
    def act(payload: bytes) -> bytes:
        raise error

    return act


# The grid


def test_every_node_is_listed_and_isolated() -> None:
    seen: dict[int, Context] = {}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen[context.node_id] = context
        context.state["mine"] = ConfigRecord({"node": context.node_id})
        return Message(wrap(b""), reply_to=message)

    grid = LocalGrid(app, 3)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    list(grid.send_and_receive([to(node, b"") for node in (1, 2, 3)]))
    assert {node: dict(context.node_config) for node, context in seen.items()} == {
        node: {"partition-id": node - 1, "num-partitions": 3} for node in (1, 2, 3)
    }
    assert {c.state["mine"]["node"] for c in seen.values()} == {1, 2, 3}


def test_send_and_receive() -> None:
    grid, people = federation()
    replies = list(grid.send_and_receive([to(3, b"x"), to(1, b"y")]))
    assert [payload_of(reply) for reply in replies] == [b"eve did x", b"ada did y"]
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1]
    assert people[1].asked == []
    assert list(grid.send_and_receive([])) == []


def test_push_then_pull_in_any_order_once() -> None:
    grid, people = federation()
    ids = list(grid.push_messages([to(node, b"x") for node in (1, 2, 3)]))
    assert len(set(ids)) == 3 and not any(person.asked for person in people)
    assert list(grid.pull_messages(["unknown"])) == []
    replies = {i: payload_of(m) for _ in range(4) for i in ids for m in grid.pull_messages([i])}
    assert replies == dict(zip(ids, [b"ada did x", b"bob did x", b"eve did x"], strict=True))
    assert list(grid.pull_messages(ids)) == []
    assert [len(person.asked) for person in people] == [1, 1, 1]


def test_replies_name_the_message_they_answer() -> None:
    grid, _ = federation()
    (message_id,) = grid.push_messages([to(2, b"x")])
    (reply,) = grid.pull_messages([message_id])
    assert reply.metadata.reply_to_message_id == message_id


def test_what_a_client_does_to_a_message_stays_with_it() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own: Any = message.content["meadow"]
        own["payload"] = b"spoilt"
        return Message(wrap(b""), reply_to=message)

    shared = RecordDict({"meadow": ConfigRecord({"payload": b"clean"})})
    messages = [Message(shared, dst_node_id=node, message_type="train") for node in (1, 2)]
    list(LocalGrid(app, 2).send_and_receive(messages))
    assert shared["meadow"]["payload"] == b"clean"


def test_a_group_works_at_the_same_time() -> None:
    barrier = threading.Barrier(2)

    def meet(payload: bytes) -> bytes:
        barrier.wait(30)  # breaks unless both are here
        return b"met"

    grid, _ = federation(meet, meet, group=2)
    replies = grid.send_and_receive([to(1, b""), to(2, b"")])
    assert [payload_of(reply) for reply in replies] == [b"met", b"met"]


def test_a_created_message_is_flowers() -> None:
    message = federation()[0].create_message(wrap(b"x"), "train", 2, "group")
    assert (message.metadata.dst_node_id, message.metadata.message_type) == (2, "train")
    assert message.metadata.group_id == "group"


def test_there_is_no_flower_run() -> None:
    with pytest.raises(NotImplementedError, match="journal"):
        _ = federation()[0].run


# The peers over it


def test_peers_are_known_by_name() -> None:
    peers = peers_of(federation()[0])
    assert peers.names() == ["ada", "bob", "eve"] == peers.names()
    answers = dict(peers.ask("train", ["eve", "ada"], lambda name: name[::-1].encode(), 9.0))
    assert answers == {"eve": b"eve did eve", "ada": b"ada did ada"}
    measured = dict(peers.ask("evaluate", ["bob"], lambda name: b"x", 9.0))
    assert measured == {"bob": b"bob measured x"}


def test_a_cohort_older_than_this_process_is_found() -> None:
    """A resumed round asks names some of which are gone."""
    peers = peers_of(federation()[0])
    answers = dict(peers.ask("train", ["bob", "gone"], lambda name: b"x", 9.0))
    assert answers == {"bob": b"bob did x"}


@pytest.mark.parametrize("error", [DataError("a row is empty"), UpdateError("loss is nan", "lr")])
def test_a_fault_of_one_becomes_its_refusal(error: Exception) -> None:
    peers = peers_of(federation(None, fail(error))[0])
    answers = dict(peers.ask("train", list(NAMES), lambda name: b"x", 9.0))
    assert isinstance(answers["bob"], Refusal) and answers["bob"] == str(error)
    assert answers["ada"] == b"ada did x" and answers["eve"] == b"eve did x"


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ZeroDivisionError()])
@pytest.mark.parametrize("group", [1, 3])
def test_a_full_disk_and_a_defect_end_the_run(error: Exception, group: int) -> None:
    grid, people = federation(fail(error), group=group)
    with pytest.raises(type(error)):
        list(peers_of(grid).ask("train", list(NAMES), lambda name: b"x", 9.0))


def test_a_reply_of_another_kind_is_a_refusal() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = {1: RecordDict(), 2: RecordDict({"meadow": ConfigRecord({"payload": 7})})}
        return Message(content[context.node_id], reply_to=message)

    answers = dict(peers_of(LocalGrid(app, 2)).ask("train", ["ada", "bob"], lambda _: b"x", 9.0))
    assert answers == dict.fromkeys(["ada", "bob"], Refusal("the reply carries no payload"))


def test_who_is_known_and_not_there_cannot_be_asked() -> None:
    app = build(lambda node: Person("ada"))  # type: ignore[arg-type, return-value]
    assert peers_of(LocalGrid(app, 2)).names() == ["ada", "bob"]


def test_what_comes_when_nobody_waits_is_told_as_late() -> None:
    grid, people = federation()
    peers = peers_of(grid)
    for name, reply in peers.ask("train", list(NAMES), lambda name: b"first", 9.0, 1):
        assert (name, reply) == ("ada", b"ada did first")
        break
    found = list(peers.ask("train", list(NAMES), lambda name: b"second", 9.0, 2))
    late = [(name, reply) for name, reply in found if isinstance(reply, Late)]
    answers = {name: reply for name, reply in found if not isinstance(reply, Late)}
    assert answers == {name: f"{name} did second".encode() for name in NAMES}
    assert late == [(n, Late("train", 1, f"{n} did first".encode())) for n in ("bob", "eve")]
    assert not grid._done and not peers._late


def test_nobody_is_waited_for_after_the_deadline() -> None:
    class Silent(LocalGrid):
        def pull_messages(self, message_ids: object) -> list[Message]:
            return []

    app = build(lambda node: Person("ada"))  # type: ignore[arg-type, return-value]
    grid = Silent(app, 1)
    peers = peers_of(grid)
    assert list(peers.ask("train", ["ada"], lambda name: b"x", 0.05)) == []


def test_the_server_app_hands_its_grid_to_main() -> None:
    seen: list[list[str]] = []
    app = build_server_app(
        lambda peers: seen.append(peers.names()), lambda: NODES, lambda cohort: [list(cohort)]
    )
    app(federation()[0], Context(1, 0, {}, RecordDict(), {}))
    assert seen == [["ada", "bob", "eve"]]
