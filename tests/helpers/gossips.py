"""Peers, charters and records for tests of the decentralised mode, and the state by definition."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meadow.identity import Identity
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import Pool, directions
from meadow.strategies.charter import Charter, Member
from meadow.strategies.introductions import Introduction, JoinRequest
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import START, Head, Quantisation, Record

RUN = hashlib.sha256(b"a run").hexdigest()
BASE = hashlib.sha256(b"a base").hexdigest()


def identity(name: str) -> Identity:
    seed = hashlib.sha256(name.encode()).digest()
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


def member(who: Identity, address: str = "peer.example:1") -> Member:
    return Member(peer_of(who), b"certificate of " + peer_of(who), address)


def charter_of(
    *founders: Identity, rank: int = 4, largest_shift: int = 16, silent: Collection[Identity] = ()
) -> Charter:
    pool = Pool(RUN, BASE, (Site("a", 4, 3), Site("b", 2, 4)), rank)
    members = (member(who, "" if who in silent else "peer.example:1") for who in founders)
    ordered = tuple(sorted(members, key=lambda each: each.peer))
    return Charter(pool, ordered, largest_shift=largest_shift)


def introduce(introducer: Identity, joiner: Identity, address: str = "peer.example:2") -> bytes:
    run = bytes.fromhex(RUN)
    request = JoinRequest.sign(joiner, run, b"certificate", address)
    return Introduction.sign(introducer, request).encoded


def record(
    who: Identity, head: Head | None = None, steps: bytes = b"\x01\xff\x7f", shift: int = 2
) -> Record:
    return Record.sign(
        who, bytes.fromhex(RUN), head or Head(), steps, shift, Quantisation.EIGHT_BIT
    )


def chain(who: Identity, length: int, head: Head | None = None, salt: int = 0) -> list[Record]:
    """`length` records one after the other; another salt gives another chain."""
    made: list[Record] = []
    for index in range(length):
        steps = hashlib.sha256(b"%d %d" % (salt, index)).digest()[: 1 + index % 5]
        made.append(record(who, made[-1].head if made else head, steps.replace(b"\x80", b"\0")))
    return made


def counted_by_definition(records: Iterable[Record]) -> dict[bytes, list[Record]]:
    """What counts of a set of valid records of members: slow, and written from the definition."""
    places: dict[bytes, dict[int, dict[bytes, Record]]] = defaultdict(lambda: defaultdict(dict))
    for each in records:
        body = each.encoded[:-64]
        places[each.peer][each.sequence][hashlib.sha256(body).digest()] = each
    return {peer: _unbroken(found) for peer, found in places.items()}


def _unbroken(places: dict[int, dict[bytes, Record]]) -> list[Record]:
    forked = [sequence for sequence, found in places.items() if len(found) > 1]
    counted: list[Record] = []
    previous, steps = START, 0
    while len(counted) < min(forked, default=2**40) and (found := places.get(len(counted))):
        ((digest, each),) = found.items()
        if each.previous != previous or each.first_step != steps:
            break
        counted.append(each)
        previous, steps = digest, steps + len(each.steps)
    return counted


def q_by_definition(charter: Charter, records: Iterable[Record]) -> torch.Tensor:
    """Q step by step, in python integers."""
    rank = charter.pool.rank
    q = [[0] * rank for _ in range(rank)]
    for each in (found for chain in counted_by_definition(records).values() for found in chain):
        count = len(each.steps)
        k = directions(RUN, each.peer, each.first_step, count, rank * rank)
        for byte, direction in zip(each.steps, k.tolist(), strict=True):
            signed = byte - 256 if byte > 127 else byte
            q[direction // rank][direction % rank] -= signed * 2**each.shift
    return torch.tensor([q], dtype=torch.int64)
