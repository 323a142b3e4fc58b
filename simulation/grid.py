"""LocalGrid: Flower's public `Grid` in one process, without server, sockets or Ray.

The same ServerApp and ClientApp run over it as over a deployed Flower; all clients share one base
model.  A message is worked on when it is pulled for, in the order of sending, so that a run is
deterministic; messages that were pushed together may be computed in groups (`group` > 1: each in
its own thread, meeting in the fused trainer).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from . import flower_identity


class Meeting(Protocol):
    """Where the members of a group meet; told when one begins and when a member is done."""

    def open(self, count: int) -> None: ...

    def leave(self) -> None: ...


class LocalGrid(Grid):
    """Nodes 1 to n, each with its own Flower context, all served by one ClientApp."""

    def __init__(
        self, app: ClientApp, nodes: int, group: int = 1, meeting: Meeting | None = None
    ) -> None:
        flower_identity.assume()
        self._app, self._group, self._meeting = app, group, meeting
        self._contexts = {node: _context(node, nodes) for node in range(1, nodes + 1)}
        self._queue: dict[str, Message] = {}
        self._done: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        raise NotImplementedError(
            "the local grid has no Flower run: meadow's run id is in the journal"
        )

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"local-{self._sent:09d}"
            own = copy.deepcopy(message)  # mods may change what several messages share
            flower_identity.name_message(own.metadata, message_id)
            self._queue[message_id] = own
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        if not any(message_id in self._done for message_id in wanted) and self._queue:
            self._work(list(self._queue)[: self._group])
        return [self._done.pop(message_id) for message_id in wanted if message_id in self._done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        while self._queue:
            self._work(list(self._queue)[: self._group])
        return list(self.pull_messages(ids))

    def _work(self, ids: Sequence[str]) -> None:
        batch = [self._queue.pop(message_id) for message_id in ids]
        if self._meeting is not None:
            self._meeting.open(len(batch))
        if len(batch) == 1:
            replies = [self._call(batch[0])]
        else:
            with ThreadPoolExecutor(len(batch)) as pool:
                replies = list(pool.map(self._call, batch))
        self._done |= dict(zip(ids, replies, strict=True))

    def _call(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        finally:
            if self._meeting is not None:
                self._meeting.leave()


def _context(node: int, nodes: int) -> Context:
    return Context(
        run_id=1,
        node_id=node,
        node_config={"partition-id": node - 1, "num-partitions": nodes},
        state=RecordDict(),
        run_config={},
    )
