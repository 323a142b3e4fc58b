"""The Flower ServerApp: lets a coordinator ask its peers over a Flower grid.

One of the three files that import Flower.  Messages carry meadow's own bytes in a ConfigRecord,
because Flower's arrays refuse bf16 and their sizes are not checked before parsing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .coordinator import Refusal

VERBS = {"train": "train", "evaluate": "evaluate"}
"""meadow's closed list of verbs and the Flower message type that each travels in."""

Nodes = Callable[[], Mapping[str, int]]
"""The participants that may be asked, by name, and the Flower node of each."""


def wrap(payload: bytes) -> RecordDict:
    return RecordDict({"meadow": ConfigRecord({"payload": payload})})


class GridPeers:
    """Flower's nodes as `Peers`: one message and one reply in memory at a time.

    Replies that come when nobody waits for them any more are pulled and dropped, by name.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Nodes,
        groups: Callable[[Sequence[str]], list[list[str]]],
        poll: float = 0.0,
        on_late: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._grid, self._nodes, self._groups = grid, nodes, groups
        self._poll, self._on_late = poll, on_late
        self._late: dict[str, str] = {}  # message id to name

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
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        deadline = time.monotonic() + deadline_seconds
        pending = self._push(verb, names, payload, deadline_seconds)
        try:
            while pending and time.monotonic() < deadline:
                yield from self._pull(pending)
                self._drop_late()
                time.sleep(self._poll)
        finally:
            self._late |= pending

    def _push(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
    ) -> dict[str, str]:
        """Message id to name.  Each message is made, sent and forgotten before the next."""
        nodes = self._nodes()
        pending: dict[str, str] = {}
        for name in names:
            if name in nodes:
                message = Message(
                    wrap(payload(name)),
                    dst_node_id=nodes[name],
                    message_type=VERBS[verb],
                    ttl=deadline_seconds + 60.0,
                )
                pending |= dict.fromkeys(self._grid.push_messages([message]), name)
        return pending

    def _pull(self, pending: dict[str, str]) -> Iterator[tuple[str, bytes | Refusal]]:
        for message_id in sorted(pending):
            for reply in self._grid.pull_messages([message_id]):
                yield pending.pop(message_id), _unwrap(reply)

    def _drop_late(self) -> None:
        for name, _ in self._pull(self._late):
            self._on_late(name)


def _unwrap(reply: Message) -> bytes | Refusal:
    if reply.has_error():
        return Refusal(reply.error.reason)
    payload = reply.content.config_records.get("meadow", ConfigRecord()).get("payload")
    return payload if isinstance(payload, bytes) else Refusal("the reply carries no payload")


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

    def peers_of(nodes: Nodes, on_late: Callable[[str], None]) -> GridPeers:
        return GridPeers(grid, nodes, deployment.alone, deployment.POLL_SECONDS, on_late)

    deployment.serve(Path(os.environ["MEADOW_COORDINATOR"]), peers_of)
