"""Any sequence of commands and crashes, against a model of a dozen lines."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from faulty_disk import Crash, Faulty, Numbered
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from registries import FILES, Clock, adapter, open_registry

from meadow.errors import PromotionError, RegistryError, StorageError, UnknownAdapterError
from meadow.server.registry import Registry
from meadow.server.registry_gates import Checked, Verdict
from meadow.server.registry_gc import DAY, Retention

NAMES = st.sampled_from(["mail", "team/post"])
CONTENTS = st.integers(1, 4)
ALIASES = st.sampled_from(["prod", "canary"])


class No:
    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        return Verdict(False, ("no",))


class Machine(RuleBasedStateMachine):
    """`live` has the contents of each name by number; `stacks` what each alias can go back to."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.live: dict[str, dict[int, int]] = {"mail": {}, "team/post": {}}
        self.last = {"mail": 0, "team/post": 0}
        self.stacks: dict[tuple[str, str], list[int]] = {}
        self.moves: dict[tuple[str, str], list[int]] = {}
        self.pinned: set[int] = set()
        self.registry = self._open()

    def _open(self) -> Registry:
        return open_registry(self.root, disk=Numbered(self.root), clock=self.clock)

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root)

    # Rules

    @rule(name=NAMES, content=CONTENTS)
    def publish(self, name: str, content: int) -> None:
        version = self.registry.keep(name, adapter(content))
        self._published(name, content)
        assert self.live[name][version.number] == content

    def _published(self, name: str, content: int) -> None:
        if content not in self.live[name].values():
            self.last[name] += 1
            self.live[name][self.last[name]] = content

    @rule(name=NAMES, content=CONTENTS, alias=ALIASES)
    def promote(self, name: str, content: int, alias: str) -> None:
        text = f"{name}@sha256:{adapter(content).id}"
        try:
            self.registry.promote(text, alias)
        except UnknownAdapterError:
            assert content not in self.live[name].values()
            return
        stack = self.stacks.setdefault((name, alias), [])
        if not stack or stack[-1] != content:
            stack.append(content)
            self.moves.setdefault((name, alias), []).append(content)

    @rule(name=NAMES, content=CONTENTS, alias=ALIASES)
    def refuse(self, name: str, content: int, alias: str) -> None:
        text = f"{name}@sha256:{adapter(content).id}"
        try:
            self.registry.promote(text, alias, No())
        except UnknownAdapterError:
            assert content not in self.live[name].values()
        except PromotionError:
            assert self.registry.history(name, alias)[-1].kind == "refused"
        else:
            assert self.stacks[name, alias][-1] == content

    @rule(name=NAMES, alias=ALIASES)
    def rollback(self, name: str, alias: str) -> None:
        stack = self.stacks.get((name, alias), [])
        below = list(stack)
        while below and (below[-1] == stack[-1] or below[-1] not in self.live[name].values()):
            below.pop()
        try:
            self.registry.rollback(name, alias)
        except RegistryError:
            assert not below
            return
        self.stacks[name, alias] = below
        self.moves[name, alias].append(below[-1])

    @rule(name=NAMES, content=CONTENTS)
    def pin(self, name: str, content: int) -> None:
        if content in self.live[name].values():
            self.registry.pin(f"{name}@sha256:{adapter(content).id}")
            self.pinned.add(content)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        content = data.draw(st.sampled_from(sorted(self.pinned)))
        name = next(name for name in self.live if content in self.live[name].values())
        self.registry.unpin(f"{name}@sha256:{adapter(content).id}")
        self.pinned.discard(content)

    @rule(history=st.integers(0, 2), lease=st.booleans())
    def collect(self, history: int, lease: bool) -> None:
        self.clock.now += DAY
        opened = [self.registry.lease(v) for v in self.registry.versions()[:1] if lease]
        self.registry.collect(Retention(history, 0.5))
        stay = set(self.pinned)
        for place, stack in self.stacks.items():
            stay |= {stack[-1], *stack[-history - 1 :]}
            stay |= set(self.moves[place][-history:] if history else [])
        stay |= {n for n in range(1, 5) for o in opened if adapter(n).id == o.version.id}
        for name, live in self.live.items():
            self.live[name] = {number: n for number, n in live.items() if n in stay}
        for one in opened:
            one.close()

    @rule(name=NAMES, content=CONTENTS, at=st.integers(1, 30),
          way=st.sampled_from(["before", "after", "torn", "power", "full"]))  # fmt: skip
    def crash_while_publishing(self, name: str, content: int, at: int, way: str) -> None:
        self.registry.close()
        disk = Faulty(self.root, at, way)
        try:
            with open_registry(self.root, disk=disk, clock=self.clock) as registry:
                registry.keep(name, adapter(content))
                self._published(name, content)
        except Crash:
            shutil.rmtree(self.root)
            disk.survivor.rename(self.root)
        except StorageError:
            assert way == "full"
        self.registry = self._open()
        known = {version.id for version in self.registry.versions(name)}
        if adapter(content).id in known:  # it may have ended just after all was done
            self._published(name, content)

    # What always holds

    @invariant()
    def the_model_agrees(self) -> None:
        for name, live in self.live.items():
            found = {version.number: version.id for version in self.registry.versions(name)}
            assert found == {number: adapter(content).id for number, content in live.items()}
        points = {(a.name, a.alias): a.version.id for a in self.registry.aliases()}
        assert points == {place: adapter(stack[-1]).id for place, stack in self.stacks.items()}

    @invariant()
    def all_is_whole(self) -> None:
        for version in self.registry.versions():
            self.registry.verify(version)
            folder = self.registry.folder / "versions" / version.id
            assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


Machine.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
TestRegistry = Machine.TestCase
