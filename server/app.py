"""The Flower ServerApp: lets a coordinator ask its peers over a Flower grid.

One of the three files that import Flower.  Messages carry meadow's own bytes in a ConfigRecord,
because Flower's arrays refuse bf16 and their sizes are not checked before parsing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ..message_pieces import cut, joined
from .coordinator import Refusal
from .late_answers import Late
from .reply_collector import Collector, Direct, Replies

VERBS = {"train": "train", "evaluate": "evaluate"}
"""meadow's closed list of verbs and the Flower message type that each travels in."""

_LOST = frozenset({3, 4, 5, 8})
"""Errors of Flower's own by which nobody refuses: a message, its answer, the SuperNode or its
client process is gone (flwr.common.constant.ErrorCode)."""

_SPARE_SECONDS = 60.0
"""So much longer than somebody waits for its answer a message can be answered."""

_LOOK_SECONDS = 1.0
"""Between two questions whether a SuperNode has begun anew."""

_GONE = "it does not take part any more"

Door = Callable[[], object]
"""What changes whenever another gateway begins; None while there is none."""
Nodes = Callable[[], Mapping[str, int]]
"""The participants that may be asked, by name, and the Flower node of each."""


def wrap(payload: bytes) -> RecordDict:
    """A payload as a message's content, in pieces that every gateway takes."""
    return RecordDict({name: ConfigRecord({**piece}) for name, piece in cut(payload).items()})


class GridPeers:
    """Flower's nodes as `Peers`: one message and one reply in memory at a time.

    `elsewhere` says that the nodes are other machines, whose replies may come slowly or not at all.
    `door` tells one gateway from the next: what a gateway that was killed had in hand is lost.
    What is lost on its way, because a process at either end was killed, is asked again once the
    node is online: a participant answers with the same bytes.  A question can be answered for as
    long as `lives` deadlines; what comes when nobody waits for it any more is told as such.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Nodes,
        groups: Callable[[Sequence[str]], list[list[str]]],
        poll: float = 0.0,
        elsewhere: bool = False,
        door: Door = lambda: None,
        lives: int = 1,
    ) -> None:
        self._grid, self._nodes, self._groups = grid, nodes, groups
        self._poll, self._door, self._lives = poll, door, lives
        self._replies: Replies[Message] = (Collector if elsewhere else Direct)(self._pull_one)
        self._late: dict[str, str] = {}  # message id to name
        self._questions: dict[str, tuple[str, int]] = {}  # message id to verb and round

    def names(self) -> list[str]:
        online = set(self._grid.get_node_ids())
        return sorted(name for name, node in self._nodes().items() if node in online)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        return self._groups(cohort)

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
    ) -> Iterator[tuple[str, bytes | Refusal | Late]]:
        deadline = time.monotonic() + deadline_seconds
        more = (self._lives - 1) * deadline_seconds + _SPARE_SECONDS
        begun = Begun(self._grid, self._door)
        pending = self._push((verb, number), names, payload, deadline_seconds + more)
        lost: set[str] = set()
        try:
            while (pending or lost) and (left := deadline - time.monotonic()) > 0:
                yield from self._answers(pending, lost)
                self._forget(pending, begun.anew(), lost)
                if back := sorted(lost.intersection(self.names() if lost else ())):
                    lost.difference_update(back)
                    begun.note(map(self._nodes().__getitem__, back))
                    pending |= self._push((verb, number), back, payload, left + more)
                yield from self._come_late()
                time.sleep(self._poll)
        finally:
            self._late |= pending

    def _forget(self, pending: dict[str, str], nodes: set[int], lost: set[str]) -> None:
        """What SuperNodes had received that have begun anew is lost, as far as we wait for it."""
        names = {name for name, node in self._nodes().items() if node in nodes} if nodes else set()
        for message_id in [id for id, name in pending.items() if name in names]:
            lost.add(pending[message_id])
            self._late[message_id] = pending.pop(message_id)

    def _answers(
        self, pending: dict[str, str], lost: set[str]
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        """What has come; who has to be asked again is added to `lost`."""
        nodes = self._nodes()
        for name in sorted(lost.union(pending.values()).difference(nodes)):
            lost.discard(name)
            self._late |= {id: pending.pop(id) for id in list(pending) if pending[id] == name}
            yield name, Refusal(_GONE)
        for name, _, reply in self._pull(pending):
            if isinstance(reply, _Lost):
                lost.add(name)
            else:
                yield name, reply

    def _push(
        self,
        question: tuple[str, int],
        names: Sequence[str],
        payload: Callable[[str], bytes],
        seconds: float,
    ) -> dict[str, str]:
        """Message id to name.  Each message is made, sent and forgotten before the next."""
        nodes = self._nodes()
        pending: dict[str, str] = {}
        for name in names:
            if name in nodes:
                message = Message(
                    wrap(payload(name)),
                    dst_node_id=nodes[name],
                    message_type=VERBS[question[0]],
                    ttl=seconds,
                )
                pending |= (sent := dict.fromkeys(self._grid.push_messages([message]), name))
                self._questions |= dict.fromkeys(sent, question)
        return pending

    def _pull(
        self, pending: dict[str, str]
    ) -> Iterator[tuple[str, tuple[str, int], bytes | Refusal]]:
        """Name, question and reply."""
        for message_id, reply in self._replies.of(pending):
            question = self._questions.pop(message_id)
            yield pending.pop(message_id), question, _unwrap(reply)

    def _pull_one(self, message_id: str) -> list[Message]:
        return list(self._grid.pull_messages([message_id]))

    def _come_late(self) -> Iterator[tuple[str, Late]]:
        for name, question, reply in self._pull(self._late):
            if not isinstance(reply, _Lost):
                yield name, Late(*question, reply if name in self._nodes() else Refusal(_GONE))


class Begun:
    """When each SuperNode has begun, and the gateway before them all; a grid without processes of
    its own says it of none."""

    def __init__(
        self,
        grid: Grid,
        door: Door = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._door, self._clock = grid, door, clock
        self._entered = door()
        self._known = self._now()
        self._not_before = clock() + _LOOK_SECONDS

    def anew(self) -> set[int]:
        """The nodes that have begun anew since the last look, which is now and then; all of them
        where the gateway has."""
        if self._clock() < self._not_before:
            return set()
        self._not_before = self._clock() + _LOOK_SECONDS
        before, self._entered = self._entered, self._door() or self._entered
        if before != self._entered:
            return set(self._known | self._now())
        known, self._known = self._known, self._known | self._now()
        return {node for node, begun in known.items() if self._known[node] != begun}

    def note(self, nodes: Iterable[int]) -> None:
        """These are asked now: only what comes after counts."""
        now = self._now()
        self._known |= {node: now[node] for node in nodes if node in now}

    def _now(self) -> dict[int, str]:
        """Of all that are online."""
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}


class _Lost(Refusal):
    """Flower's word for a message that nobody will answer."""


def _unwrap(reply: Message) -> bytes | Refusal:
    if reply.has_error():
        lost = reply.error.code in _LOST
        return (_Lost if lost else Refusal)(reply.error.reason or "for no known reason")
    payload = joined(reply.content.config_records)
    return Refusal("the reply carries no payload") if payload is None else payload


def build(
    main: Callable[[GridPeers], None],
    nodes: Nodes,
    groups: Callable[[Sequence[str]], list[list[str]]],
) -> ServerApp:
    """A ServerApp whose main job is `main`, with the grid's nodes as its peers."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridPeers(grid, nodes, groups))

    return app


app = ServerApp()
"""What Flower's executor runs on a coordinator's machine: the run in MEADOW_COORDINATOR."""


@app.main()
def deployed(grid: Grid, context: Context) -> None:
    from . import deployment  # loads torch
    from .coordinator_home import CoordinatorHome

    folder = Path(os.environ["MEADOW_COORDINATOR"])
    door = CoordinatorHome(folder).which_gateway

    def peers_of(nodes: Nodes, lives: int) -> GridPeers:
        poll, alone = deployment.POLL_SECONDS, deployment.alone
        return GridPeers(grid, nodes, alone, poll, elsewhere=True, door=door, lives=lives)

    deployment.serve(folder, peers_of)
