"""Looking back: a replay is the live state, a retraction is by definition, lies are found."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gossips import identity
from tiny_peers import Town, found, key, serving, until_equal

from meadow.client.peer_audit import audit, cuts, replay
from meadow.client.peer_memory import read_ledger
from meadow.config import Config
from meadow.errors import JournalError
from meadow.strategies.ledger import Kind, Ledger
from meadow.strategies.records import Head, Record

RECORDS = 3


@pytest.fixture(scope="module")
def town(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Town:
    """Ada and Bob have worked side by side for a while."""
    town = found(tiny, tmp_path_factory.mktemp("town"))
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        for _ in range(RECORDS):
            ada.step()
            bob.exchange()
            bob.step()
            until_equal(ada, bob)
        ada.report()
    return town


@pytest.fixture
def ledger(town: Town) -> Ledger:
    return read_ledger(town.charter, town.root / "ada")


def by_definition(ledger: Ledger, *names: str) -> torch.Tensor:
    q = ledger.charter.pool.zero()
    for name in names:
        for each in ledger.chain(key(name)).counted():
            each.fold_into(q)
    return q


def test_a_replay_is_the_live_state(town: Town, ledger: Ledger) -> None:
    shown = json.loads((town.root / "ada" / "status.json").read_text())
    replayed = replay(ledger)
    assert replayed.state_id == shown["state"] == ledger.state_id
    assert (replayed.records, replayed.steps, replayed.peers) == (6, 12, 2)
    assert torch.equal(replayed.q, by_definition(ledger, "ada", "bob"))


def test_without_a_peer_is_a_sum_of_the_others(town: Town, ledger: Ledger) -> None:
    rest = replay(ledger, {key("ada")})
    assert torch.equal(rest.q, by_definition(ledger, "bob")) and bool(rest.q.any())
    assert (rest.records, rest.steps, rest.peers) == (3, 6, 1)
    assert not replay(ledger, {key("ada"), key("bob")}).q.any()


@pytest.mark.parametrize("name", ["ada", "bob"])
def test_on_the_same_machine_all_bytes_come_out_the_same(town: Town, name: str) -> None:
    ledger, folder = read_ledger(town.charter, town.root / name), town.root / name
    rows = list(audit(town.stepper(name), ledger, folder, 9, random.Random(1)))
    assert [row.sequence for row in rows] == [0, 1, 2]
    assert all(row.equal == row.steps == 2 and row.worst == 0 for row in rows)


def test_as_many_as_asked_for_are_measured(town: Town, ledger: Ledger) -> None:
    chosen = set()
    for seed in range(8):
        rows = audit(town.stepper("ada"), ledger, town.root / "ada", 1, random.Random(seed))
        chosen |= {row.sequence for row in rows}
    assert chosen == {0, 1, 2}


def test_the_audit_measures_on_the_model_of_that_time(town: Town, ledger: Ledger) -> None:
    """The logged cut matters: another one gives other bytes, at steps that are coarse enough."""
    stepper = town.stepper("ada")
    last = ledger.chain(key("ada")).counted()[-1]
    right = ledger.q_at(heads_at(town, ledger, last.sequence))
    q = right + 2**26
    again = stepper.walk(right, last.first_step, len(last.steps), last.shift)
    other = stepper.walk(q, last.first_step, len(last.steps), last.shift)
    assert again.bytes.tolist() != other.bytes.tolist()


def heads_at(town: Town, ledger: Ledger, sequence: int) -> dict[bytes, Head]:
    cut = cuts(town.root / "ada")[sequence]
    assert cut[key("ada").hex()] == sequence and len(cut) == 2
    chains = {ledger.chain(bytes.fromhex(name)): count for name, count in cut.items()}
    return {
        each.counted()[0].peer: each.counted()[count - 1].head for each, count in chains.items()
    }


@pytest.fixture
def liar(tiny: Config, tmp_path: Path) -> Iterator[Town]:
    """Ada signs other bytes than she measured."""
    town = found(tiny, tmp_path)
    with town.peer("ada") as ada:
        ada.step()
        made = ada.stepper.make(ada.gossip.ledger.q, ada.gossip.ledger.head(ada.me), 1)
        head = ada.gossip.ledger.head(ada.me)
        true = made.record.steps
        false = bytes([true[0] ^ 0x40, true[1]])
        ada.log.tell("record", {"cut": {ada.me.hex(): 1}}, 1)
        record = Record.sign(identity("ada"), town.charter.run, head, false, made.record.shift)
        ada.gossip.publish(Kind.RECORD, record.encoded)
    yield town


def test_bytes_that_were_not_measured_are_found(liar: Town) -> None:
    ledger = read_ledger(liar.charter, liar.root / "ada")
    honest, false = audit(liar.stepper("ada"), ledger, liar.root / "ada", 2, random.Random(0))
    assert honest.equal == honest.steps and false.sequence == 1
    assert false.equal == 1 and false.worst >= 64


def test_a_torn_log_says_less_and_breaks_nothing(liar: Town) -> None:
    log = liar.root / "ada" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if b'"record"' in line)
    lines[first] = lines[first][: len(lines[first]) // 2] + b"\n"
    log.write_bytes(b"".join(lines) + b'[1]\n\xff\xfe\n{"kind": "record"')
    assert [*cuts(liar.root / "ada")] == [1]
    ledger = read_ledger(liar.charter, liar.root / "ada")
    rows = list(audit(liar.stepper("ada"), ledger, liar.root / "ada", 9, random.Random(0)))
    assert [row.sequence for row in rows] == [1]
    with liar.peer("ada") as ada:  # and goes on writing to it
        ada.step()
    assert [*cuts(liar.root / "ada")] == [1, 2]


def test_a_record_that_was_made_anew_is_audited_on_its_second_cut(liar: Town) -> None:
    log = liar.root / "ada" / "events.jsonl"
    stale = {"kind": "record", "round": 0, "cut": {key("bob").hex(): 5}}
    log.write_bytes(json.dumps(stale).encode() + b"\n" + log.read_bytes())
    ledger = read_ledger(liar.charter, liar.root / "ada")
    (first, _) = audit(liar.stepper("ada"), ledger, liar.root / "ada", 2, random.Random(0))
    assert first.equal == first.steps


def test_nothing_to_audit_is_said(town: Town, ledger: Ledger) -> None:
    with pytest.raises(JournalError, match="no record of this peer .*meadow peer run"):
        next(audit(town.stepper("eve"), ledger, town.root / "ada", 1, random.Random(0)))


def test_a_model_that_no_longer_counts_is_passed_over_and_said_if_it_is_all(liar: Town) -> None:
    """Another's proven fork must not keep a peer from auditing what can be measured."""
    log, stale = liar.root / "ada" / "events.jsonl", {key("bob").hex(): 5}
    ledger = read_ledger(liar.charter, liar.root / "ada")
    for number, left in ((0, [1]), (1, [])):
        late = {"kind": "record", "round": number, "cut": stale}
        log.write_bytes(log.read_bytes() + json.dumps(late).encode() + b"\n")
        found = audit(liar.stepper("ada"), ledger, liar.root / "ada", 2, random.Random(0))
        if left:
            assert [row.sequence for row in found] == left
        else:
            with pytest.raises(JournalError, match="all 2 records .* do not count any more"):
                next(found)


@pytest.mark.parametrize(
    "event",
    [{"round": 0, "cut": {"zz": 1}}, {"cut": {}}, {"round": "x", "cut": {}},
     {"round": 0, "cut": {64 * "0": "1"}}, {"round": 0, "cut": [1]}],
)  # fmt: skip
def test_a_log_of_nonsense_says_nothing(liar: Town, event: dict[str, Any]) -> None:
    log = liar.root / "ada" / "events.jsonl"
    log.write_text(json.dumps({"kind": "record", **event}) + "\n" + 10**5 * "[" + "\n")
    assert cuts(liar.root / "ada") == {}
    ledger = read_ledger(liar.charter, liar.root / "ada")
    with pytest.raises(JournalError, match="events.jsonl must be kept"):
        next(audit(liar.stepper("ada"), ledger, liar.root / "ada", 2, random.Random(0)))
    log.unlink()
    with pytest.raises(JournalError, match="events.jsonl must be kept"):
        next(audit(liar.stepper("ada"), ledger, liar.root / "ada", 2, random.Random(0)))


@pytest.mark.parametrize(
    "change",
    ["data = zeroblob(120)", "data = data || x'00'", "data = 'text'", "sequence = 'x'",
     "checksum = 0", "peer = 7"],
)  # fmt: skip
def test_a_ledger_that_was_tampered_with_is_not_replayed(liar: Town, change: str) -> None:
    with sqlite3.connect(liar.root / "ada" / "records.db") as database:
        database.execute(f"UPDATE entries SET {change} WHERE sequence = 1")
    database.close()
    with pytest.raises(JournalError, match=r"records.db is damaged.*restore"):
        read_ledger(liar.charter, liar.root / "ada")
