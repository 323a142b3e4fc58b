"""What is lost on its way is asked again; what a participant refuses is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from meadow.server import app
from meadow.server.app import GridPeers, wrap
from meadow.server.coordinator import Refusal
from meadow.server.late_answers import Late
from meadow.simulation.grid import LocalGrid

MESSAGE_UNAVAILABLE, REPLY_UNAVAILABLE, NODE_UNAVAILABLE, APP_CRASHED = 3, 4, 5, 8
RAISED, MEADOWS_OWN = 2, 100
NODES = {"ada": 1, "bob": 2}

Act = Callable[[int, Message], Message]


class Away(LocalGrid):
    """Nodes of which some are away for so many questions."""

    def __init__(self, act: Act, away: Mapping[int, int] | None = None) -> None:
        client = ClientApp()
        self.times = dict.fromkeys(NODES.values(), 0)

        @client.train()
        def train(message: Message, context: Context) -> Message:
            self.times[context.node_id] += 1
            return act(self.times[context.node_id], message)

        super().__init__(client, len(NODES))
        self.away = dict(away or {})
        self.sent_to: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        gone = {node for node, questions in self.away.items() if questions > 0}
        self.away = {node: questions - 1 for node, questions in self.away.items()}
        return [node for node in NODES.values() if node not in gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        self.sent_to += [message.metadata.dst_node_id for message in listed]
        return super().push_messages(listed)


class Forgetful(Away):
    """Says when its nodes began; one of them begins anew with its first message in hand."""

    def __init__(self, restarts: int) -> None:
        super().__init__(lambda times, message: Message(message.content, reply_to=message))
        self.began = dict.fromkeys(NODES.values(), 0)
        self.restarts = restarts
        self.forgotten = 0

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=str(self.began[node]))
            for node in self.get_node_ids()
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        mine = [i for i in wanted if i in self._queue and self._node_of(i) == 2]
        if mine and self.forgotten < self.restarts:
            self.forgotten += 1
            self.began[2] += 1
            self._queue.pop(mine[0])
        queued = [i for i in wanted if i in self._queue]
        for message_id in queued:
            self._work([message_id])
        return [self._done.pop(i) for i in wanted if i in self._done]

    def _node_of(self, message_id: str) -> int:
        return int(self._queue[message_id].metadata.dst_node_id)


class Lossy(Forgetful):
    """Node 2's first message goes to a gateway that is killed with it in hand."""

    def __init__(self, door: Callable[[], str | None]) -> None:
        super().__init__(restarts=1)
        self.door = door

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = super().pull_messages(message_ids)
        self.began[2] = 0  # the node itself goes on
        return found


def peers_of(grid: LocalGrid, nodes: Callable[[], Mapping[str, int]] = lambda: NODES) -> GridPeers:
    return GridPeers(grid, nodes, lambda cohort: [[name] for name in cohort])


def asked(peers: GridPeers, seconds: float = 60.0) -> dict[str, Any]:
    return dict(peers.ask("train", list(NODES), str.encode, seconds))


def fails_first(code: int) -> Act:
    """The first question of each node ends in an error, the others in an answer."""

    def act(times: int, message: Message) -> Message:
        if times == 1:
            return Message(Error(code, "the reason"), reply_to=message)
        return Message(message.content, reply_to=message)

    return act


@pytest.mark.parametrize(
    "code", [MESSAGE_UNAVAILABLE, REPLY_UNAVAILABLE, NODE_UNAVAILABLE, APP_CRASHED]
)
def test_what_is_lost_is_asked_again(code: int) -> None:
    grid = Away(fails_first(code))
    assert asked(peers_of(grid)) == {"ada": b"ada", "bob": b"bob"}
    assert grid.times == {1: 2, 2: 2}


@pytest.mark.parametrize("code", [RAISED, MEADOWS_OWN])
def test_a_refusal_is_final(code: int) -> None:
    grid = Away(fails_first(code))
    assert asked(peers_of(grid)) == dict.fromkeys(NODES, Refusal("the reason"))
    assert grid.times == {1: 1, 2: 1}


def test_a_node_is_asked_again_only_once_it_is_back() -> None:
    grid = Away(fails_first(NODE_UNAVAILABLE), away={2: 5})
    assert asked(peers_of(grid)) == {"ada": b"ada", "bob": b"bob"}
    assert grid.sent_to.count(2) == 2 and grid.away[2] <= 0


def test_who_stays_away_is_waited_for_until_the_deadline() -> None:
    grid = Away(fails_first(NODE_UNAVAILABLE), away={2: 10**9})
    assert asked(peers_of(grid), 0.2) == {"ada": b"ada"}
    assert grid.sent_to.count(2) == 1


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_what_a_supernode_had_in_hand_when_it_began_anew_is_asked_again(
    restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_LOOK_SECONDS", 0.0)
    grid = Forgetful(restarts)
    assert asked(peers_of(grid)) == {"ada": b"ada", "bob": b"bob"}
    assert grid.times == {1: 1, 2: 1} and grid.sent_to.count(2) == 1 + restarts


def test_what_a_gateway_had_in_hand_when_it_was_killed_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of everybody who has not answered; for the time in which there is none nobody is asked."""
    monkeypatch.setattr(app, "_LOOK_SECONDS", 0.0)
    doors = iter(["first", "first", None, "second"])
    grid = Lossy(lambda: next(doors, "second"))
    peers = GridPeers(grid, lambda: NODES, lambda cohort: [[n] for n in cohort], door=grid.door)
    assert asked(peers) == {"ada": b"ada", "bob": b"bob"}
    assert grid.sent_to.count(2) == 2 and grid.sent_to.count(1) == 1


def test_a_node_that_is_asked_again_is_known_to_have_begun_anew() -> None:
    grid = Forgetful(0)
    begun = app.Begun(grid, clock=iter(range(0, 1000, 10)).__next__)
    assert begun.anew() == set()
    grid.began[2] += 1
    assert begun.anew() == {2} and begun.anew() == set()
    grid.began[2] += 1
    begun.note([2])
    assert begun.anew() == set()
    grid.away = {2: 1}
    assert begun.anew() == set()


def test_who_may_not_take_part_any_more_is_not_waited_for() -> None:
    nodes = dict(NODES)

    def silent(times: int, message: Message) -> Message:
        nodes.pop("bob", None)  # revoked while it works
        return Message(Error(NODE_UNAVAILABLE, "away"), reply_to=message)

    grid = Away(silent, away={1: 10**9, 2: 10**9})
    answers = peers_of(grid, lambda: nodes).ask("train", list(NODES), str.encode, 600.0)
    name, reply = next(answers)
    assert name == "bob" and isinstance(reply, Refusal) and "take part" in reply


def test_what_is_lost_after_its_time_is_no_late_answer() -> None:
    def second(times: int, message: Message) -> Message:
        lost = Message(Error(NODE_UNAVAILABLE, "away"), reply_to=message)
        return lost if times == 1 else Message(wrap(b"now"), reply_to=message)

    grid = Away(second)
    peers = peers_of(grid)
    assert list(peers.ask("train", list(NODES), str.encode, 0.0)) == []
    assert asked(peers) == {"ada": b"now", "bob": b"now"}
    assert not peers._late and not peers._questions


def test_what_comes_after_its_time_is_told_with_what_was_asked() -> None:
    nodes = dict(NODES)
    grid = Away(lambda times, message: Message(message.content, reply_to=message))
    peers = peers_of(grid, lambda: nodes)
    assert list(peers.ask("train", list(NODES), str.encode, 0.0, 3)) == []
    del nodes["bob"]  # revoked since: what it sent may not count any more
    found = list(peers.ask("train", ["ada"], str.encode, 60.0, 4))
    late = [(name, answer) for name, answer in found if isinstance(answer, Late)]
    assert ("ada", b"ada") in found and len(found) == 3
    assert ("ada", Late("train", 3, b"ada")) in late
    assert [answer.answer for name, answer in late if name == "bob"] == [
        Refusal("it does not take part any more")
    ]


@pytest.mark.parametrize(("lives", "seconds"), [(1, 160.0), (3, 360.0)])
def test_a_question_lives_as_long_as_its_answer_may_count(lives: int, seconds: float) -> None:
    grid = Away(lambda times, message: Message(message.content, reply_to=message))
    sent: list[float] = []
    real = grid.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        sent.extend(message.metadata.ttl for message in listed)
        return real(listed)

    grid.push_messages = push  # type: ignore[method-assign]
    peers = GridPeers(grid, lambda: NODES, lambda cohort: [[n] for n in cohort], lives=lives)
    assert len(asked(peers, 100.0)) == 2
    assert sent == [seconds, seconds]
