"""What travels in a run of peers: a record of 200 steps, and what a joiner fetches."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..client.gossip_messages import encode_item, seal
from ..identity import Identity
from ..peft_adapters.layout import Site
from ..peft_adapters.pool import Pool
from ..strategies.base import Update
from ..strategies.charter import Charter, Member
from ..strategies.checkpoint import Checkpoint
from ..strategies.ledger import Item, Kind, Ledger
from ..strategies.messages import pack_update
from ..strategies.peer_keys import peer_of
from ..strategies.records import MOST_SHIFT, MOST_STEPS, Head, Record
from .zo_setup import RANK

STEPS = 200
PEERS = 8
SIGNERS = 3
_GRPC = 5  # bytes before each gRPC message: flag and length

# FedKSeed's messages, from its paper: a seed and a scalar of four bytes each for every step up,
# and a number of four bytes for each of 4,096 seeds down.
_THEIR_RECORD = 8 * STEPS
_THEIR_JOIN = 4 * 4096


def rows(rank: int = RANK) -> list[dict[str, Any]]:
    """The cases record_bytes and join_bytes."""
    identities = [_identity(number) for number in range(PEERS)]
    ledger = _ledger(identities, rank)
    return [_record(identities[0], ledger), _join(identities, ledger)]


def _record(identity: Identity, ledger: Ledger) -> dict[str, Any]:
    charter = ledger.charter
    data = Record.sign(identity, charter.run, Head(), bytes(range(1, 101)) * 2, 4).encoded
    message = seal(charter.digest, encode_item(Item(Kind.RECORD, data, peer_of(identity))))
    update = Update({"bytes": torch.zeros(STEPS, dtype=torch.int8)}, 1.0)
    return {
        "case": "record_bytes",
        "value": len(data),
        "unit": "bytes",
        "baseline": _THEIR_RECORD,
        "ratio": len(data) / _THEIR_RECORD,
        "bar": 400,
        "framing": len(message) - len(data) + _GRPC,  # of meadow's message in a gRPC one
        "coordinated": len(pack_update(update)),  # unsigned, as content of a Flower message
    }


def _join(identities: list[Identity], ledger: Ledger) -> dict[str, Any]:
    """The least favourable state: every number of Q takes four bytes."""
    sizes = []
    for history in range(1, 5):
        for identity in identities:
            head = ledger.head(peer_of(identity))
            steps = bytes([127]) * MOST_STEPS
            record = Record.sign(identity, ledger.charter.run, head, steps, MOST_SHIFT)
            ledger.add(Kind.RECORD, record.encoded)
        if history in (2, 4):
            sizes.append(_checkpoint(identities, ledger))
    return {
        "case": "join_bytes",
        "value": max(sizes),
        "unit": "bytes",
        "baseline": _THEIR_JOIN,
        "ratio": max(sizes) / _THEIR_JOIN,
        "bar": 17_000,
        "members": PEERS,
        "signers": SIGNERS,
        "at_half_the_history": min(sizes),
    }


def _checkpoint(identities: list[Identity], ledger: Ledger) -> int:
    checkpoint = Checkpoint.take(ledger)
    for identity in identities[:SIGNERS]:
        checkpoint = checkpoint.sign(identity, ledger)
    return len(checkpoint.encoded)


def _ledger(identities: list[Identity], rank: int) -> Ledger:
    pool = Pool(64 * "0", 64 * "0", (Site("layer", rank, rank),), rank)
    members = (Member(peer_of(each), b"", "peer:1") for each in identities)
    founders = sorted(members, key=lambda member: member.peer)
    return Ledger(Charter(pool, tuple(founders)))


def _identity(number: int) -> Identity:
    seed = hashlib.sha256(f"meadow bench zo {number}".encode()).digest()
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))
