"""What a run gives away: its adapter with a signed manifest, in its folder and in the registry.

Whatever ends the process, the next one writes the same again: the adapter follows from the
journal's state, the manifest from the adapter, the journal and the key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import Config
from ..identity import Identity
from ..journal import Journal
from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.manifest import ADAPTER, write_manifest
from ..store import Disk
from ..strategies.base import State, Strategy
from .publishing import Publishing
from .run_folder import HeldOut, provenance

PUBLISHED = "published"
"""Where in the run's folder the adapter of a round lies that was published before the end."""


@dataclass(frozen=True)
class RunOutput:
    """The output of the run in `folder`; `participants` is how many take part, at its end."""

    config: Config
    folder: Path
    strategy: Strategy
    blueprint: Blueprint
    journal: Journal
    identity: Identity
    publishing: Publishing | None
    disk: Disk
    held_out: HeldOut = HeldOut()

    def settle(self, number: int, state: State) -> None:
        """After a round was closed, and when a run goes on: publish its adapter, if it is due and
        not the last, which `finish` publishes."""
        last = number == self.config.rounds.count
        if not last and self.publishing is not None and self.publishing.due(number):
            self._write(self.folder / PUBLISHED, number, state)
            self.publishing.publish(self.folder / PUBLISHED, number)

    def finish(self, state: State) -> None:
        """Write the run's adapter and its manifest, and publish them."""
        count = self.config.rounds.count
        self._write(self.folder, count, state)
        if self.publishing is not None:
            self.publishing.publish(self.folder, count)

    def _write(self, folder: Path, number: int, state: State) -> None:
        journal, tree = self.journal, self.strategy.export(state)
        self.disk.folder(folder)
        self.blueprint.export(self.config, tree, folder / ADAPTER, journal.run_id, self.disk)
        stated = provenance(
            self.config,
            self.blueprint.digest,
            len(journal.get("joined") or {}),
            self.strategy.personal,
            journal,
            number,
            self.held_out,
        )
        if self.publishing is not None:
            stated = replace(stated, parents=self.publishing.parents(journal.run_id, number))
        write_manifest(folder, self.identity, stated, self.disk)
