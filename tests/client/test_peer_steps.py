"""A peer's steps: measured as defined, the same on any threads, refused over another base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gossips import identity
from safetensors.torch import load_file, save_file
from tiny import save_base
from tiny_peers import Town, found, key, peer_config

from meadow.client.encode import batch_indices
from meadow.client.peer_audit import replay
from meadow.client.peer_memory import read_ledger
from meadow.client.peer_steps import Stepper
from meadow.client.workbench import open_workbench
from meadow.config import Config
from meadow.errors import ConfigError, ModelError, RecordError
from meadow.peft_adapters.pool import directions, draws
from meadow.strategies.base import Loss
from meadow.strategies.ledger import Kind
from meadow.strategies.records import LAST_STEP, Head, Quantisation, Record


@pytest.fixture(scope="module")
def town(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Town:
    return found(tiny, tmp_path_factory.mktemp("nowhere"))


def test_a_record_holds_what_the_steps_measured_one_after_the_other(town: Town) -> None:
    """By definition: at each step both losses of the model so far, nudged along its direction."""
    stepper, pool = town.stepper("ada", steps=3), town.charter.pool
    head = Head(4, 1000, b"d" * 32)
    made = stepper.make(pool.zero(), head, members=1)
    epsilon, unit = 2.0**town.charter.epsilon_exponent, 2.0**-pool.unit
    q = pool.zero()
    for at, byte in enumerate(np.frombuffer(made.record.steps, np.int8).tolist()):
        step = 1000 + at
        (k,) = directions(pool.run_id, key("ada"), step, 1, pool.size)
        plus, minus = (loss_of(stepper, q, int(k), sign * epsilon / unit, step) for sign in (1, -1))
        exact = (plus - minus) / (2 * epsilon) / 2.0**town.charter.gradient_exponent
        assert abs(byte - exact) <= 1.05 or abs(byte) == 127
        q[0, int(k) // pool.rank, int(k) % pool.rank] -= byte << made.record.shift
    folded = pool.zero()
    made.record.fold_into(folded)
    assert torch.equal(folded, q) and torch.equal(made.walked.q, q) and bool(q.any())
    assert made.record.head.count == 5 and made.record.previous == b"d" * 32


def loss_of(stepper: Stepper, q: torch.Tensor, k: int, units: float, step: int) -> float:
    """The batch's loss with Q moved along one direction, by way of the exported adapter."""
    moved, rank = q.clone(), stepper.charter.pool.rank
    moved[0, k // rank, k % rank] += round(units)
    person, batch = stepper.person, stepper.trainer.recipe.batch
    chosen = batch_indices(len(person.train), batch, step, person.seed, person.name)
    adapter = stepper.charter.pool.adapter(moved, stepper.trainer.bank.scaling)
    return stepper.trainer.loss(Loss(adapter), [person.train[index] for index in chosen]).loss


def test_the_same_place_gives_the_same_record_and_another_shift_another(town: Town) -> None:
    zero, head = town.charter.pool.zero(), Head()
    first, again = (town.stepper("ada").make(zero, head, 1).record for _ in range(2))
    assert first.encoded == again.encoded
    assert town.stepper("ada").make(zero, head, 16).record.shift == first.shift - 2
    assert town.stepper("bob").make(zero, head, 1).record.steps != b""


def test_a_loss_that_is_not_finite_is_a_byte_of_zero_and_counted(town: Town) -> None:
    bench = open_workbench(town.config)
    stepper = Stepper(town.config, town.charter, identity("ada"), bench, town.person("ada"))
    with torch.no_grad():
        bench.base.model.get_parameter("model.norm.weight").fill_(torch.nan)
    made = stepper.make(town.charter.pool.zero(), Head(), 1)
    assert made.record.steps == b"\0\0" and made.walked.lost == 2
    q = town.charter.pool.zero()
    made.record.fold_into(q)
    assert not q.any()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": {"targets": ["q_proj"]}}, ModelError, "adapts other layers"),
        ({"model": {"rank": 2}}, ConfigError, "rank is 2 here, and 4 in the charter"),
        ({"strategy": {"options": {"scale": -5}}}, ConfigError, "scale is -5 here, and -6"),
        ({"strategy": {"options": {"unit": 28, "scale": -6}}}, ConfigError, "unit is 28"),
        ({"strategy": {"options": {"epsilon": -9}}}, ConfigError, "epsilon is -9"),
        (
            {"strategy": {"options": {"cores": "per_layer", "scale": -6}}},
            ConfigError,
            "cores is 'per_layer'",
        ),
    ],
)
def test_what_differs_from_the_charter_is_refused_before_any_work(
    town: Town, change: dict[str, dict[str, object]], error: type[Exception], says: str
) -> None:
    config = town.config.replace(**change)
    bench = open_workbench(config)
    with pytest.raises(error, match=says):
        Stepper(config, town.charter, identity("ada"), bench, town.person("ada"))


def test_another_base_is_refused_by_its_digest(town: Town, tmp_path: Path) -> None:
    file = save_base(tmp_path / "base") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    config = town.config.replace(model={"base": str(tmp_path / "base")})
    with pytest.raises(ModelError, match="about another base: its digest is"):
        Stepper(config, town.charter, identity("ada"), open_workbench(config), town.person("ada"))


def test_a_base_that_is_quantised_is_said_so_in_the_record(town: Town) -> None:
    """The bytes alone do not show it; whether the kernels are there is another test's."""
    stepper = town.stepper("ada")
    stepper.config = stepper.config.replace(model={"quantize": "4bit"})
    record = stepper.make(town.charter.pool.zero(), Head(), 1).record
    assert record.quantisation == Quantisation.FOUR_BIT
    assert Record.decode(record.encoded, town.charter.run) == record


def test_a_peer_whose_steps_are_used_up_makes_no_further_record(town: Town) -> None:
    head = Head(LAST_STEP // 1000 + 1, LAST_STEP - 1, b"d" * 32)
    with pytest.raises(RecordError, match="last step"):
        town.stepper("ada").make(town.charter.pool.zero(), head, 1)


# --- the same bits on any machine -------------------------------------------------------------

REBUILD = """
import hashlib, json, sys
from pathlib import Path
import torch
from meadow.client.peer_audit import replay
from meadow.client.peer_memory import read_ledger
from meadow.strategies.charter import Charter

torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
charter = Charter.read((folder / "charter.json").read_bytes())
found = replay(read_ledger(charter, folder))
tree = charter.pool.adapter(found.q)
digest = hashlib.sha256(b"".join(tree[name].numpy().tobytes() for name in sorted(tree)))
print(json.dumps([found.state_id, digest.hexdigest(), torch.backends.cpu.get_cpu_capability()]))
"""


@pytest.fixture(scope="module")
def folder(town: Town) -> Iterator[Path]:
    """Some records, and a Q whose numbers are large."""
    with town.peer("ada", steps=1000, lr=4e-3) as ada:
        head = Head()
        for number in range(3):
            raw = draws(b"bytes", town.charter.pool.run_id, b"%d" % number, 0, 1000)
            steps = bytes(value % 256 for value in raw).replace(b"\x80", b"\x7f")
            record = Record.sign(identity("ada"), town.charter.run, head, steps, shift=14)
            ada.gossip.publish(Kind.RECORD, record.encoded)
            head = record.head
    yield ada.folder


def rebuilt(folder: Path, threads: int, **variables: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
    done = subprocess.run(
        [sys.executable, "-c", REBUILD, str(folder), str(threads)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_same_records_give_the_same_bits_on_any_threads(town: Town, folder: Path) -> None:
    ledger, before = read_ledger(town.charter, folder), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            replayed = replay(ledger)
            tree = town.charter.pool.adapter(replayed.q)
            found.append((replayed.state_id, {n: t.numpy().tobytes() for n, t in tree.items()}))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2] and replayed.steps == 3000


@pytest.mark.long
def test_the_same_records_give_the_same_bits_under_any_instruction_set(folder: Path) -> None:
    variants = [
        rebuilt(folder, 1, ATEN_CPU_CAPABILITY="default"),
        rebuilt(folder, 2, ATEN_CPU_CAPABILITY="avx2"),
        rebuilt(folder, 1, MKL_ENABLE_INSTRUCTIONS="AVX2"),
        rebuilt(folder, 3),
    ]
    assert len({tuple(each[:2]) for each in variants}) == 1
    assert variants[0][2] == "DEFAULT"


def test_threads_of_the_config_are_torchs(tiny: Config) -> None:
    before = torch.get_num_threads()
    try:
        open_workbench(peer_config(tiny).replace(simulation={"threads": 3}))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
