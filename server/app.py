"""The Flower ServerApp: lets a coordinator ask its peers over a Flower grid.

One of the three files that import Flower.  Messages carry meadow's own bytes in a ConfigRecord,
because Flower's arrays refuse bf16 and their sizes are not checked before parsing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .coordinator import Refusal

VERBS = {"train": "train", "evaluate": "evaluate", "name": "query"}
"""meadow's closed list of verbs and the Flower message type that each travels in."""


def wrap(payload: bytes) -> RecordDict:
    return RecordDict({"meadow": ConfigRecord({"payload": payload})})


class GridPeers:
    """Flower's nodes as `Peers`: names are asked for once, replies come one by one in memory."""

    def __init__(
        self, grid: Grid, groups: Callable[[Sequence[str]], list[list[str]]], poll: float = 0.0
    ) -> None:
        self._grid, self._groups, self._poll = grid, groups, poll
        self._nodes: dict[str, int] = {}

    def names(self) -> list[str]:
        known = set(self._nodes.values())
        unknown = [node for node in self._grid.get_node_ids() if node not in known]
        for message, reply in self._exchange("name", dict.fromkeys(unknown, b""), 60.0):
            if isinstance(reply, bytes):
                self._nodes[reply.decode(errors="replace")] = message
        return sorted(self._nodes)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        return self._groups(cohort)

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        if not self._nodes.keys() >= set(names):
            self.names()  # a resumed round's cohort is older than this process
        by_node = {self._nodes[name]: name for name in names if name in self._nodes}
        payloads = {node: payload(name) for node, name in by_node.items()}
        for node, reply in self._exchange(verb, payloads, deadline_seconds):
            yield by_node[node], reply

    def _exchange(
        self, verb: str, payloads: dict[int, bytes], deadline_seconds: float
    ) -> Iterator[tuple[int, bytes | Refusal]]:
        messages = [
            Message(
                wrap(payload),
                dst_node_id=node,
                message_type=VERBS[verb],
                ttl=deadline_seconds + 60.0,
            )
            for node, payload in payloads.items()
        ]
        pending = set(self._grid.push_messages(messages))
        deadline = time.monotonic() + deadline_seconds
        while pending and time.monotonic() < deadline:
            for message_id in tuple(sorted(pending)):
                for reply in self._grid.pull_messages([message_id]):
                    pending.discard(message_id)
                    yield reply.metadata.src_node_id, _unwrap(reply)
            time.sleep(self._poll)


def _unwrap(reply: Message) -> bytes | Refusal:
    if reply.has_error():
        return Refusal(reply.error.reason)
    payload = reply.content.config_records.get("meadow", ConfigRecord()).get("payload")
    return payload if isinstance(payload, bytes) else Refusal("the reply carries no payload")


def build(
    main: Callable[[GridPeers], None], groups: Callable[[Sequence[str]], list[list[str]]]
) -> ServerApp:
    """A ServerApp whose main job is `main`, with the grid's nodes as its peers."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridPeers(grid, groups))

    return app
