"""A run that ends at any step of the disk, in any way, and is started again, ends as if it had
never ended: the same adapter to the bit, and every contribution counted once.

Run as a program, this file is the long tier's child process: there SIGKILL ends the runs.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import forked, interrupt, said_by
from faulty_disk import Deadly, Faulty, Numbered
from safetensors.torch import load_file
from tiny import CLIENTS, config_over

from meadow.client.outbox import Outbox
from meadow.config import Config
from meadow.journal import Journal, RunIdentity
from meadow.server.run_folder import environment
from meadow.simulation.engine import Lab, open_lab, simulate
from meadow.store import Disk, digest_of
from meadow.strategies.registry import STRATEGIES

CASES = ("fedavg_lora", "diloco", "fused", "fedkseed", "pool_lora")
POOLS: dict[str, dict[str, Any]] = {
    "fedkseed": {"momentum": 0.5, "importance": True},
    "pool_lora": {"zeroth": ["eve"]},  # the two others by gradients
}


def variant(tiny: Config, case: str) -> Config:
    """The run of a case: a strategy, or DiLoCo in fused groups, whose clients remember most: their
    optimiser's state and what rounding has kept back."""
    if case == "fused":
        engine = {"engine": "fused", "group": 2}
        rounded = {"wire": "bfloat16"}
        return tiny.replace(strategy={"name": "diloco"}, simulation=engine, clients=rounded)
    return tiny.replace(strategy={"name": case, "options": POOLS.get(case, {})})


def adapter(root: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(root / "run" / "adapter" / "adapter_model.safetensors"))


class Reference:
    """A run that nothing ended: what all others have to equal."""

    def __init__(self, config: Config, lab: Lab, root: Path) -> None:
        self.config, self.lab = config, lab
        disk = Numbered(root)
        self.metrics = simulate(config, root / "run", lab, disk=disk).metrics
        self.adapter, self.count, self.tearable = adapter(root), disk.count, disk.tearable

    def places(self, way: str) -> list[int]:
        return self.tearable if way == "torn" else list(range(1, self.count + 1))

    def run(self, root: Path, disk: Disk) -> None:
        simulate(self.config, root / "run", self.lab, disk=disk)

    def finish(self, root: Path, disk: Disk | None = None) -> None:
        """Give the same command again, and check that nothing shows."""
        disk = disk or Numbered(root)
        result = simulate(self.config, root / "run", self.lab, disk=disk)
        found = adapter(root)
        assert found.keys() == self.adapter.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.view(torch.int32), self.adapter[name].view(torch.int32)), name
        assert result.metrics == self.metrics
        assert not list((root / "run").rglob("*.draft"))
        self.check_counts(root, disk)

    def check_counts(self, root: Path, disk: Disk) -> None:
        """Each client counted once a round, with the very bytes that its outbox recorded."""
        identity = RunIdentity(self.config.digest(), self.lab.base.digest, environment())
        with Journal.open(root / "run", identity, disk) as journal:
            for number in (1, 2):
                outboxes = {
                    name: Outbox(root / "run" / "clients", name, journal.run_id, disk)
                    for name in CLIENTS
                }
                sent = {name: outbox.pending(number) for name, outbox in outboxes.items()}
                assert journal.contributions(number) == {
                    name: digest_of(data or b"") for name, data in sent.items()
                }
                assert journal.refusals(number) == {}


@pytest.fixture(scope="module")
def reference(
    tiny: Config, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    return cache(lambda case: Reference(variant(tiny, case), lab, tmp_path_factory.mktemp("whole")))


def try_all(reference: Reference, way: str, places: list[int], roots: Iterator[Path]) -> None:
    for at, root in zip(places, roots, strict=False):
        reference.finish(interrupt(reference.run, Faulty(root, at, way)))


def test_a_run_has_many_steps(reference: Callable[[str], Reference]) -> None:
    for case in CASES:
        assert reference(case).count > 110 and len(reference(case).tearable) > 30


@pytest.mark.parametrize(
    ("case", "way", "sampled"),
    [
        ("fedavg_lora", "before", 8), ("fedavg_lora", "torn", 7), ("fedavg_lora", "power", 7),
        ("fedavg_lora", "full", 7), ("diloco", "before", 5), ("diloco", "power", 5),
        ("fused", "before", 4), ("fused", "torn", 4), ("fedkseed", "power", 4),
        ("pool_lora", "before", 4),
    ],
)  # fmt: skip
def test_some_steps(
    reference: Callable[[str], Reference], roots: Iterator[Path], case: str, way: str, sampled: int
) -> None:
    """Evenly spaced steps, others for each kind of fault; the long tier takes all."""
    places = reference(case).places(way)
    stride = len(places) // sampled
    try_all(reference(case), way, places[len(way) % stride :: stride], roots)


@pytest.mark.long(minutes=2)
@pytest.mark.parametrize(
    ("case", "ways"),
    [
        ("fedavg_lora", ("before", "torn", "power", "full")),
        ("diloco", ("before", "torn", "power")),
        ("fused", ("before", "torn")),
        ("fedkseed", ("before", "power")),
        ("pool_lora", ("before", "torn")),
    ],
)
def test_every_step(
    reference: Callable[[str], Reference], roots: Iterator[Path], case: str, ways: tuple[str, ...]
) -> None:
    """To die after a step is to die before the next one."""
    for way in ways:
        try_all(reference(case), way, reference(case).places(way), roots)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(CASES)))
def test_every_strategy_resumes_between_two_answers(
    tiny: Config, lab: Lab, roots: Iterator[Path], name: str
) -> None:
    whole = Reference(tiny.replace(strategy={"name": name}), lab, next(roots))
    try_all(whole, "before", [whole.count * 6 // 10], roots)


def test_two_crashes_in_a_row(reference: Callable[[str], Reference], roots: Iterator[Path]) -> None:
    whole = reference("diloco")
    for at, root in zip((30, 75), roots, strict=False):
        first = Faulty(root, at, "before")
        second = Faulty(interrupt(whole.run, first), 25, "power", first.undo)
        whole.finish(interrupt(whole.run, second))


# Real processes


@pytest.mark.long
@pytest.mark.parametrize("kind", ["step", "instant"])
@pytest.mark.parametrize("case", ["fedavg_lora", "diloco", "fused", "fedkseed"])
def test_sigkill(tmp_path: Path, tiny: Config, case: str, kind: str) -> None:
    """A process that runs `simulate` is killed, and started again until it ends by itself."""
    said = said_by(__file__, str(tmp_path), tiny.model.base, tiny.data.source, case, kind)
    assert int(said) >= (10 if kind == "step" else 3)  # instants depend on the machine


def kill_at_steps(whole: Reference, folder: Path) -> int:
    """Fork a run that kills itself at a step, start it again; how many died."""
    deaths = 0
    for at in range(1, whole.count + 1, 5):
        root = folder / f"step{at}"
        root.mkdir()
        way = "torn" if at % 2 and at in whole.tearable else "before"
        disk = Deadly(root, at, way)
        deaths += forked(partial(whole.run, root, disk))
        whole.finish(root)
        shutil.rmtree(root)
    return deaths


def kill_at_instants(whole: Reference, folder: Path) -> int:
    """Fork runs and kill each at a random instant, until one ends by itself; how many died."""
    began = time.monotonic()
    (folder / "timed").mkdir()
    assert not forked(partial(whole.run, folder / "timed", Disk()))
    seconds = time.monotonic() - began  # of a whole run here and now: no instant comes too late
    dice, deaths = random.Random(1), 0
    for number in range(12):
        root = folder / f"instant{number}"
        root.mkdir()
        while forked(partial(whole.run, root, Disk()), dice.uniform(0.02, 0.9) * seconds):
            deaths += 1
        whole.finish(root)
        shutil.rmtree(root)
    return deaths


def main(folder: Path, base: str, rows: str, case: str, kind: str) -> int:
    config = variant(config_over(Path(base), Path(rows)), case)
    lab = open_lab(config)
    (folder / "whole").mkdir()
    whole = Reference(config, lab, folder / "whole")
    return {"step": kill_at_steps, "instant": kill_at_instants}[kind](whole, folder)


if __name__ == "__main__":
    sys.stdout.write(str(main(Path(sys.argv[1]), *sys.argv[2:])))
