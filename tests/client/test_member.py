"""A member computes once, remembers before it sends, and keeps a bounded amount of disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from faulty_disk import Crash, Faulty, Numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client.member import Member
from meadow.client.outbox import Outbox
from meadow.errors import FormatError, StorageError, UpdateError
from meadow.peft_adapters.layout import Tree
from meadow.store import Disk
from meadow.strategies.base import (
    Answer,
    Loss,
    Measured,
    Request,
    State,
    Strategy,
    Turn,
    Update,
    Work,
)
from meadow.strategies.messages import pack_update, turn_to_json, unpack_update
from meadow.strategies.transforms import Cast

RUN = "0123abcd"


class Counting(Strategy):
    """Memory counts this client's own rounds; an update tells the memory that it began with."""

    def init(self, seed: int) -> State:
        return State()

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update({})

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        before = memory.tensors.get("rounds", torch.zeros(1))
        measured = yield Loss({"rounds": before})
        return Update({"u": before * measured.loss}), State({"rounds": before + 1})

    def step(self, state: State, total: Update, turn: Turn) -> State:
        return state

    def export(self, state: State) -> Tree:
        return {}

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        return Loss({"rounds": memory.tensors.get("rounds", torch.zeros(1))})

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {"u": (1,)}


class Responder:
    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.loss = 1.0

    def __call__(self, request: Request) -> Answer:
        self.requests.append(request)
        return Measured(self.loss, 5)


def member(
    folder: Path, rehearse: bool = False, disk: Disk | None = None
) -> tuple[Member, Responder]:
    respond, outbox = Responder(), Outbox(folder / "clients", "ada", RUN, disk or Disk())
    return Member("ada", Counting(), outbox, respond, rehearse=rehearse), respond


def message(round: int, client: str = "ada") -> bytes:
    return pack_update(Update({}), turn=turn_to_json(Turn(round, 99, 1, client=client)))


def began_with(answer: bytes) -> float:
    return float(unpack_update(answer)[0].tensors["u"])


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_same_turn_is_computed_once(tmp_path: Path) -> None:
    first, respond = member(tmp_path)
    answers = {first.work(message(1)), first.work(message(1)), member(tmp_path)[0].work(message(1))}
    assert len(answers) == 1 and len(respond.requests) == 1


def test_rehearsing_computes_again_and_sends_the_recorded_bytes(tmp_path: Path) -> None:
    sent = member(tmp_path)[0].work(message(1))
    again, respond = member(tmp_path, rehearse=True)
    assert again.work(message(1)) == sent and len(respond.requests) == 1
    assert began_with(again.work(message(2))) == 1.0  # the rehearsal left no second memory


def test_a_rehearsal_begins_with_the_memory_of_its_round(tmp_path: Path) -> None:
    first, _ = member(tmp_path)
    for round in (1, 2, 3):
        sent = first.work(message(round))
    again, respond = member(tmp_path, rehearse=True)
    assert again.work(message(3)) == sent and began_with(sent) == 2.0
    (request,) = respond.requests
    assert isinstance(request, Loss) and request.adapter["rounds"].item() == 2.0


def test_a_rehearsal_that_differs_changes_nothing(tmp_path: Path) -> None:
    """Another machine may round differently: what was recorded is what is sent."""
    first, _ = member(tmp_path)
    first.work(message(1))
    sent = first.work(message(2))
    again, respond = member(tmp_path, rehearse=True)
    respond.loss = 7.0
    assert again.work(message(2)) == sent and began_with(sent) == 1.0


@pytest.mark.parametrize("payload", [message(1, "bob"), message(1, "")])
def test_another_clients_turn_is_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(FormatError, match="ada received a turn of"):
        member(tmp_path)[0].work(payload)
    assert records(tmp_path) == []


@pytest.mark.parametrize("payload", [b"", b"noise" * 9, pack_update(Update({}))])
def test_a_message_without_a_turn_is_refused(tmp_path: Path, payload: bytes) -> None:
    for act in (member(tmp_path)[0].work, member(tmp_path)[0].evaluate):
        with pytest.raises(FormatError):
            act(payload)


def test_a_failed_training_leaves_no_record(tmp_path: Path) -> None:
    def fail(request: Request) -> Answer:
        raise UpdateError("the training loss is nan")

    unlucky = Member("ada", Counting(), Outbox(tmp_path, "ada", RUN), fail)
    with pytest.raises(UpdateError):
        unlucky.work(message(1))
    assert records(tmp_path) == []


def test_evaluation_uses_the_memory_after_the_round(tmp_path: Path) -> None:
    someone, respond = member(tmp_path)
    for round, expected in ((0, 0.0), (1, 1.0), (2, 1.0), (3, 2.0)):
        if round in (1, 3):
            someone.work(message(round))
        measured = unpack_update(someone.evaluate(message(round)))[0]
        assert measured.notes == {"loss": 1.0, "tokens": 5} and not measured.tensors
        request = respond.requests[-1]
        assert isinstance(request, Loss) and request.adapter["rounds"].item() == expected


# Space


def test_a_client_that_is_sampled_rarely_keeps_its_memory(tmp_path: Path) -> None:
    for own, round in enumerate((1, 5, 9)):
        someone, _ = member(tmp_path)
        assert began_with(someone.work(message(round))) == own
        assert len(records(tmp_path)) <= 2
    assert records(tmp_path) == ["00000005.record", "00000009.record"]


def test_what_stays_is_durable_before_anything_is_deleted(tmp_path: Path) -> None:
    """Its writer may have died before syncing it; a disk may then keep the deletion alone."""

    class Telling(Disk):
        told: list[str] = []

        def sync_folder(self, folder: Path) -> None:
            self.told.append("sync")

        def remove(self, path: Path) -> None:
            self.told.append(f"remove {path.name}")

    outbox = Outbox(tmp_path, "ada", RUN)
    for round in (1, 2, 3):
        outbox.record(round, b"payload", b"memory")
    Outbox(tmp_path, "ada", RUN, Telling()).settle(3)
    assert Telling.told == ["sync", "remove 00000001.record"]
    Outbox(tmp_path, "ada", RUN, Telling()).settle(2)
    assert len(Telling.told) == 2  # nothing to delete costs no step


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(1, 3)), max_size=12))
def test_memory_and_space_over_any_history(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, bool, int]]
) -> None:
    """Rounds move on by any gap, a client may be restarted or asked again; it forgets nothing."""
    folder = tmp_path_factory.mktemp("history")
    someone, round = member(folder, disk=Numbered(folder))[0], 0
    for own, (gap, restarted, times) in enumerate(history):
        round += gap
        if restarted:
            someone = member(folder, disk=Numbered(folder))[0]
        assert {began_with(someone.work(message(round))) for _ in range(times)} == {own}
        assert len(records(folder)) <= 2


def play(folder: Path, disk: Disk) -> list[float]:
    someone, _ = member(folder, disk=disk)
    return [began_with(someone.work(message(round))) for round in (1, 5, 9)]


@pytest.mark.parametrize("way", ["before", "power", "full"])
def test_settling_survives_a_crash_at_any_step(tmp_path: Path, way: str) -> None:
    """The coordinator of this run goes on from the round that the crash interrupted."""
    counted = Numbered(tmp_path / "count")
    counted.root.mkdir()
    assert play(counted.root, counted) == [0.0, 1.0, 2.0]
    for at in range(1, counted.count + 1):
        root = tmp_path / str(at)
        root.mkdir()
        folder, closed = cut(root, Faulty(root, at, way))
        left = [round for round in (1, 5, 9) if round > closed]
        someone, _ = member(folder, disk=Numbered(folder))
        memories = [began_with(someone.work(message(round))) for round in left]
        assert memories == [float((1, 5, 9).index(round)) for round in left]
        assert records(folder) == ["00000005.record", "00000009.record"]
        shutil.rmtree(root)


def cut(root: Path, disk: Faulty) -> tuple[Path, int]:
    """Run until the fault; where the next start finds itself, and the last round that arrived."""
    arrived = 0
    someone, _ = member(root, disk=disk)
    try:
        for round in (1, 5, 9):
            someone.work(message(round))
            arrived = round
    except Crash:
        return disk.survivor, arrived
    except StorageError:
        assert disk.way == "full"
        return root, arrived
    raise AssertionError(f"step {disk.at} did not end the run")


class Drifting(Counting):
    """Every round moves w by more than 16 bits can say."""

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        yield Loss({})
        return Update({"w": received.tensors["w"] + (1 + 2**-9)}), memory


def drifting(folder: Path, disk: Disk | None = None) -> Member:
    outbox, rounded = Outbox(folder / "clients", "ada", RUN, disk or Disk()), [Cast(torch.bfloat16)]
    return Member("ada", Drifting(), outbox, Responder(), rounded)


def drift(round: int) -> bytes:
    received = Update({"w": torch.full((3,), float(round))})
    return pack_update(received, turn=turn_to_json(Turn(round, 99, 1, client="ada")))


def test_what_rounding_kept_back_outlives_the_process(tmp_path: Path) -> None:
    """A member made anew for each round sends what one that lives on sends, to the byte."""
    resident, rounds = drifting(tmp_path / "resident"), range(1, 9)
    sent = [resident.work(drift(round)) for round in rounds]
    assert [drifting(tmp_path / "anew").work(drift(round)) for round in rounds] == sent
    told = torch.stack([unpack_update(data)[0].tensors["w"].double() for data in sent])
    assert told.sum(0).tolist() == [8 * (1 + 2**-9)] * 3  # each alone says 1
    assert len({data[-6:] for data in sent}) > 1
    again = drifting(tmp_path / "anew")
    assert again.work(drift(8)) == sent[-1]  # asked once more: nothing is owed twice
    assert not [name for name in again.own(Update({}), Turn(8, 99, 1)).adapter if "owed" in name]


@pytest.mark.parametrize("way", ["before", "torn", "power"])
def test_a_crash_loses_nothing_that_is_owed(tmp_path: Path, way: str) -> None:
    rounds = range(1, 5)
    whole, counted = tmp_path / "whole", Numbered(tmp_path / "counted")
    counted.root.mkdir()
    sent = [drifting(whole).work(drift(round)) for round in rounds]
    assert [drifting(counted.root, counted).work(drift(round)) for round in rounds] == sent
    for at in counted.tearable if way == "torn" else range(1, counted.count + 1):
        disk = Faulty(tmp_path / str(at), at, way)
        disk.root.mkdir()
        got: list[bytes] = []
        try:
            while len(got) < len(sent):
                got.append(drifting(disk.root, disk).work(drift(1 + len(got))))
        except Crash:
            later = range(1 + len(got), 5)
            got += [drifting(disk.survivor).work(drift(round)) for round in later]
        assert disk.dead and got == sent
