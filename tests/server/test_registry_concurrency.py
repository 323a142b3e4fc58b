"""Several threads and processes at once: nothing is lost, and a reader always has a version."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from registries import ME, STRANGER, adapter, open_registry

from meadow.errors import RegistryError
from meadow.server.registry import Registry

HELPERS = str(Path(__file__).parents[1] / "helpers")

WRITER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from registries import ME, STRANGER, adapter, open_registry
me, first = json.loads(sys.argv[3])
sys.stdin.readline()  # both begin together
with open_registry(Path(sys.argv[1]), (ME, STRANGER)[me]) as registry:
    for number in range(first, first + 12):
        version = registry.keep("mail", adapter(number))
        registry.promote(version, why=str(me))
        if number % 3 == 0:
            registry.rollback("mail")
        registry.keep("mail", adapter(100))  # both have this one
"""


@pytest.mark.long
def test_two_processes_publish_and_promote_at_once(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:  # its maker is the one whose signatures count
        registry.promote(registry.keep("mail", adapter(200)))  # each can roll back what it moved
    with ExitStack() as processes:
        writers = []
        for me, first in ((0, 1), (1, 51)):
            arguments = [str(tmp_path), HELPERS, json.dumps([me, first])]
            command = [sys.executable, "-c", WRITER, *arguments]
            writers.append(processes.enter_context(subprocess.Popen(command, stdin=-1, stderr=-1)))
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        errors = [writer.communicate()[1].decode() for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0], errors
    with open_registry(tmp_path) as registry:
        versions = registry.versions("mail")
        assert [version.number for version in versions] == list(range(1, 27))
        own = {adapter(n).id for n in [*range(1, 13), *range(51, 63), 100, 200]}
        assert {version.id for version in versions} == own
        for version in versions:
            registry.verify(version)
        moves = registry.history("mail", "prod")
        assert {entry.who for entry in moves} == {ME.key_id, STRANGER.key_id}
        for before, after in zip(moves, moves[1:], strict=False):
            assert after.before == before.after
        assert sum(entry.kind == "published" for entry in registry.history("mail")) == 26
        assert registry.resolve("mail").id == moves[-1].after
        assert sorted(p.name for p in (registry.folder / "versions").iterdir()) == sorted(own)


@pytest.mark.parametrize(
    ("flips", "shared"),
    [
        pytest.param(25, False, id="a hundred"),
        pytest.param(250, False, id="a thousand", marks=pytest.mark.long),
        pytest.param(250, True, id="a thousand on one registry", marks=pytest.mark.long),
    ],
)
def test_a_reader_always_sees_a_usable_version_through_all_flips(
    tmp_path: Path, flips: int, shared: bool
) -> None:
    """`flips` promotions and as many rollbacks, by each of two threads."""
    with open_registry(tmp_path) as registry, open_registry(tmp_path) as other:
        for number in (1, 2, 3):
            registry.keep("mail", adapter(number))
        registry.promote("mail@v1")
        registry.promote("mail@v2")
        faults: list[BaseException] = []
        done = threading.Event()

        def flip(mine: Registry, text: str) -> None:
            try:
                for _ in range(flips):
                    mine.promote(text)
                    _roll_back(mine)
            except BaseException as error:
                faults.append(error)
                raise

        seen: list[str] = []
        pairs = ((registry, "mail@v3"), (registry if shared else other, "mail@v1"))
        threads = [threading.Thread(target=flip, args=pair) for pair in pairs]
        reader = threading.Thread(target=_read, args=(tmp_path, seen, done, faults))
        for thread in (*threads, reader):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        reader.join()
        assert not faults
        assert set(seen) <= {adapter(number).id for number in (1, 2, 3)} and len(seen) > 1
        moves = registry.history("mail", "prod")
        for before, after in zip(moves, moves[1:], strict=False):
            assert after.before == before.after != after.after


def _roll_back(registry: Registry) -> None:
    try:
        registry.rollback("mail")
    except RegistryError as error:
        assert "no earlier version" in str(error)  # the other one has gone all the way back


def _read(root: Path, seen: list[str], done: threading.Event, faults: list[BaseException]) -> None:
    """As a server does: look at the counter, and open what the alias points to."""
    revision = -1
    try:
        with open_registry(root) as registry:
            while not done.is_set():
                now = registry.revision()
                assert now >= revision
                if now != revision:
                    with registry.lease("mail") as opened:
                        assert opened.read().rank == 8
                        seen.append(opened.version.id)
                revision = now
    except BaseException as error:
        faults.append(error)
        raise
