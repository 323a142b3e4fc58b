"""Keeps vLLM servers in step with the registry: the versions that aliases point to, and no other.

Each version has a name of its own, NAME@DIGEST12, and a path of its own in a folder that all
servers see.  A new version is copied there, loaded on every server that answers, and asked on each
of them; only then does its alias move.  The version before stays until no request is under way on
it, and is dropped then.  A server that was restarted lacks what it had, is given it again, and gets
no requests before.  Nothing is remembered: what is so is asked of the registry and the servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError, ConfigError, MeadowError, ReplicaError
from ..peft_adapters.signed_adapter import Limits
from ..store import Disk
from .canaries import Canary
from .model_routes import DIGITS, ModelRoutes, Served, names_of
from .registry import Registry
from .registry_database import is_registry
from .registry_folders import VersionFolders
from .registry_names import Reference
from .vllm_replica import Replica

GOLDEN = Canary(text="Once upon a time", tokens=8)
"""What a version is asked where the operator names nothing: that it answers at all."""

_OURS = re.compile(rf"(?P<name>.+)@[0-9a-f]{{{DIGITS}}}")


@dataclass(frozen=True)
class Shelf:
    """A folder of versions that the servers read; `mounted` is where they see it.

    What nothing needs there is deleted, so that it must be no registry's own: `check`.
    """

    folder: Path
    mounted: Path
    disk: Disk

    @property
    def _versions(self) -> VersionFolders:
        return VersionFolders(self.folder, self.disk, Limits())

    def check(self) -> None:
        """Raise ConfigError where it is a registry's folder of versions."""
        home = self.folder.resolve().parent
        if is_registry(home):
            raise ConfigError(
                f"{home} is a registry: its versions would be deleted, but for the newest",
                "give the servers' copies a folder of their own",
            )

    def put(self, registry: Registry, served: Served) -> None:
        """A verified copy of a version, whole or not at all.  Raises MeadowError."""
        self.check()
        self.disk.folder(self.folder)
        self._versions.put(registry.files(served.version))

    def path(self, served: Served) -> str:
        """Where the servers find it."""
        return str(self.mounted / served.version.id)

    def holds(self, served: Served) -> bool:
        return (self.folder / served.version.id).is_dir()

    def keep_only(self, needed: Callable[[str], bool]) -> None:
        """Delete the copies whose ids nothing needs, and what was cut off.  Raises MeadowError."""
        if not self.folder.exists():
            return
        self.check()
        self._versions.sweep()
        for id in sorted(self._versions.ids()):
            if not needed(id):
                self._versions.delete(id)


class Publisher:
    """One set of servers, aliases and a registry, brought into step by each `settle`."""

    def __init__(
        self,
        open_registry: Callable[[], Registry],
        wanted: Sequence[Reference],
        routes: ModelRoutes,
        shelf: Shelf,
        canaries: Sequence[Canary] = (),
        drain_seconds: float = 5.0,
        patience: float = 2.0,
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drain_seconds` is how long a version that no alias means stays at the least; `patience`
        how long a step waits for the slowest server, which goes on by itself."""
        self._open, self._registry = open_registry, open_registry()
        self._wanted, self._routes, self._shelf = wanted, routes, shelf
        self._canaries, self._drain_seconds = canaries or [GOLDEN], drain_seconds
        self._patience, self._tell, self._clock = patience, tell, clock
        self._shelved: set[str] = set()
        self._needed: set[str] = set()
        self._unneeded: dict[str, float] = {}  # name to when it was first seen so
        self._work: dict[Replica, asyncio.Task[dict[str, str]]] = {}
        self._faults: dict[str, str] = {}

    async def close(self) -> None:
        """Leave the servers as they are."""
        for task in self._work.values():
            task.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)
        self._registry.close()

    @property
    def faults(self) -> dict[str, str]:
        """What keeps servers and registry apart now, by what it is about."""
        return dict(self._faults)

    async def settle(self) -> bool:
        """One step towards the registry; whether servers and aliases are as it says now.

        Raises nothing that a server, the registry or the disk can cause: `faults` says it.
        """
        targets, faults = await self._targets()
        needed = {served.name: served for served in (*targets.values(), *self._routed())}
        unknown = {reference.name for reference in self._wanted if reference not in targets}
        self._note_needed(needed.keys(), unknown)
        faults |= await self._equip_all(needed)
        for reference, served in targets.items():
            self._move(reference, served)
        faults |= await asyncio.to_thread(self._clear_shelf, list(targets.values()))
        self._report(faults)
        return not faults and not self._unneeded

    async def run(self, ended: asyncio.Event, poll: float) -> None:
        """Settle every `poll` seconds until the event is set."""
        while not ended.is_set():
            await self.settle()
            try:
                await asyncio.wait_for(ended.wait(), poll)
            except TimeoutError:
                continue

    def _routed(self) -> list[Served]:
        return list(self._routes.aliases().values())

    # What the registry says

    async def _targets(self) -> tuple[dict[Reference, Served], dict[str, str]]:
        """The version of each reference, with its copy on the shelf; and what is left out, why."""
        found: dict[Reference, Served] = {}
        faults: dict[str, str] = {}
        for reference in self._wanted:
            try:
                found[reference] = await asyncio.to_thread(self._shelve, reference)
            except MeadowError as error:
                faults[str(reference)] = str(error)
        if faults:
            await asyncio.to_thread(self._reopen)
        return found, faults

    def _shelve(self, reference: Reference) -> Served:
        served = Served(self._registry.resolve(reference))
        if served.version.id not in self._shelved or not self._shelf.holds(served):
            self._shelf.put(self._registry, served)
            self._shelved.add(served.version.id)
        return served

    def _reopen(self) -> None:
        """A registry whose folder was gone and came back has to be opened anew; while that fails,
        the fault that led here is told."""
        try:
            self._registry.revision()
        except MeadowError:
            with contextlib.suppress(MeadowError):
                opened = self._open()
                self._registry.close()
                self._registry = opened

    # What the servers have

    async def _equip_all(self, needed: Mapping[str, Served]) -> dict[str, str]:
        """Let every server be worked on, each at its own pace; what is wrong with them."""
        for replica in self._routes.replicas:
            if replica not in self._work:
                self._work[replica] = asyncio.create_task(self._equip(replica, needed))
        await asyncio.wait(self._work.values(), timeout=self._patience)
        faults: dict[str, str] = {}
        for replica, task in list(self._work.items()):
            if task.done():
                faults |= self._work.pop(replica).result()
            else:
                faults[replica.url] = f"{replica.url} takes its time"
        return faults

    async def _equip(self, replica: Replica, needed: Mapping[str, Served]) -> dict[str, str]:
        """Give a server what it lacks, ask what it was given, drop what nothing needs any more;
        what went wrong, by what it is about."""
        faults: dict[str, str] = {}
        try:
            await replica.look()
            for name, served in needed.items():
                try:
                    await self._provide(replica, served)
                except (ReplicaError, AdapterError) as error:
                    about = f"{replica.url} {name}"
                    faults[about] = str(error)
                    if self._faults.get(about) != str(error):  # its copy may be damaged: once more
                        self._shelved.discard(served.version.id)
            await self._drop(replica)
        except ReplicaError as error:
            faults[replica.url] = str(error)
        return faults

    async def _provide(self, replica: Replica, served: Served) -> None:
        name, path = served.name, self._shelf.path(served)
        card = replica.card(name)
        if card is not None and Path(card.root).name != served.version.id:  # somebody else's
            await replica.unload(name)
            card = None
        if card is None:
            await replica.load(name, path)
            await replica.look()
        if name in replica.ready:
            return
        if replica.card(name) is None:
            raise ReplicaError(f"{replica.url} does not list {name} after it was loaded")
        await self._examine(replica, name)
        replica.ready.add(name)

    async def _examine(self, replica: Replica, name: str) -> None:
        """Raise AdapterError where an answer does not pass."""
        for canary in self._canaries:
            faults = canary.faults(await replica.answer(name, canary))
            if faults:
                raise AdapterError(f"{name} on {replica.url}: {'; '.join(faults)}")

    # Aliases

    def _move(self, reference: Reference, served: Served) -> None:
        """Point an alias to a version that every server that answers has."""
        replicas = [one for one in self._routes.replicas if one.cards is not None]
        if not replicas or any(served.name not in one.ready for one in replicas):
            return
        if self._routes.served(reference) != served:
            self._routes.point(reference, served)
            self._tell(f"{names_of(reference)[-1]} is {served.name} ({served.version})")

    # What nothing needs any more

    def _note_needed(self, needed: Collection[str], unknown: Collection[str]) -> None:
        """Which names are needed from now on, and since when others are not.

        Of an `unknown` adapter, whose alias the registry cannot tell now, all stay.
        """
        self._needed, now = set(needed), self._clock()
        names = {reference.name for reference in self._wanted}.difference(unknown)
        loaded = {name for one in self._routes.replicas for name in one.cards or {}}
        ours = {name for name in loaded if (m := _OURS.fullmatch(name)) and m["name"] in names}
        left = ours - self._needed
        for name in self._unneeded.keys() - left - self._needed:
            self._tell(f"{name} is dropped")
        self._unneeded = {name: self._unneeded.get(name, now) for name in left}

    async def _drop(self, replica: Replica) -> None:
        """Unload what no alias has meant for a while and no request is under way on."""
        for name, since in list(self._unneeded.items()):
            old = self._clock() - since >= self._drain_seconds
            idle = name not in self._needed and not self._routes.running(name)
            if old and idle and replica.card(name) is not None:
                await replica.unload(name)
                await replica.look()

    def _clear_shelf(self, targets: Collection[Served]) -> dict[str, str]:
        """Keep the copies of what is wanted and of what some server has."""
        if any(one.cards is None for one in self._routes.replicas):
            return {}  # who knows what that one still has
        ids = {served.version.id for served in (*targets, *self._routed())}
        loaded = {name for one in self._routes.replicas for name in one.cards or {}}
        ids |= {name[-DIGITS:] for name in loaded}
        try:
            self._shelf.keep_only(lambda id: id in ids or id[:DIGITS] in ids)
        except MeadowError as error:
            return {"shelf": str(error)}
        return {}

    def _report(self, faults: dict[str, str]) -> None:
        """Tell what is new about what is wrong."""
        for about, text in faults.items():
            if self._faults.get(about) != text:
                self._tell(text)
        for about in self._faults.keys() - faults.keys():
            self._tell(f"{about}: all right again")
        self._faults = faults
