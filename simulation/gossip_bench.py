"""How fast, and for how many bytes, gossip brings every peer to the same state.

All peers live in one process; what they exchange is what they would exchange over a network, but
for the transport's own framing.  In a round every peer pushes what is fresh and makes one exchange
with a random other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from random import Random
from statistics import mean
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..client.gossip import Gossip
from ..identity import Identity
from ..peft_adapters.layout import Site
from ..peft_adapters.pool import Pool
from ..strategies.charter import Charter, Member
from ..strategies.ledger import Kind, Ledger
from ..strategies.peer_keys import peer_of
from ..strategies.records import Record
from .peer_network import PeerNetwork

STEPS = 200  # in a record
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Convergence:
    """What it took until all peers had the same state."""

    peers: int
    records: int
    rounds: int
    mean_bytes: float  # sent and received by a peer
    most_bytes: int  # by the busiest peer
    payload_bytes: int  # of the records themselves, once
    calls: int
    state_ids: tuple[str, ...]  # of all peers, in the end


def convergence(peers: int, records: int, fanout: int, seed: int, rank: int = 64) -> Convergence:
    """Let `records` records of random steps spread among `peers` peers, and count.

    The records are dealt out evenly; `fanout` is how many peers a fresh record is pushed to.
    After a hundred rounds it gives up, and the state ids differ.
    """
    rng = Random(seed)
    network = PeerNetwork()
    identities = [_identity(rng) for _ in range(peers)]
    gossips = _gossips(identities, network, rng, rank)
    payload = sum(
        _publish(identities[index % peers], gossips[index % peers], rng) for index in range(records)
    )
    rounds = _run(gossips, fanout)
    return Convergence(
        peers=peers,
        records=records,
        rounds=rounds,
        mean_bytes=mean(network.traffic[peer_of(identity)] for identity in identities),
        most_bytes=max(network.traffic.values(), default=0),
        payload_bytes=payload,
        calls=sum(network.calls.values()),
        state_ids=tuple(gossip.ledger.state_id for gossip in gossips),
    )


def _run(gossips: list[Gossip], fanout: int) -> int:
    """Rounds until all ledgers have the same heads, or there were too many."""
    rounds = 0
    while rounds < _MOST_ROUNDS and any(g.ledger.heads != gossips[0].ledger.heads for g in gossips):
        rounds += 1
        for gossip in gossips:
            gossip.spread(fanout)
        for gossip in gossips:
            for peer in gossip.partners(1):
                gossip.sync(peer)
    return rounds


def _gossips(
    identities: list[Identity], network: PeerNetwork, rng: Random, rank: int
) -> list[Gossip]:
    names = sorted(map(peer_of, identities))
    members = tuple(Member(peer, peer, f"peer-{index}:1") for index, peer in enumerate(names))
    run, base = rng.randbytes(32).hex(), rng.randbytes(32).hex()
    charter = Charter(Pool(run, base, (Site("layer", rank, rank),), rank), members)
    gossips = []
    for me in map(peer_of, identities):
        gossip = Gossip(Ledger(charter), network.transport(me), Random(rng.random()), me)
        network.join(me, gossip.handle)
        gossips.append(gossip)
    return gossips


def _publish(identity: Identity, gossip: Gossip, rng: Random) -> int:
    """Have a peer sign one more record; its size in bytes."""
    steps = bytes(rng.randrange(1, 128) for _ in range(STEPS))
    ledger = gossip.ledger
    head = ledger.head(peer_of(identity))
    record = Record.sign(identity, ledger.charter.run, head, steps, shift=4)
    gossip.publish(Kind.RECORD, record.encoded)
    return len(record.encoded)


def _identity(rng: Random) -> Identity:
    seed = hashlib.sha256(rng.randbytes(32)).digest()
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


def rows() -> list[dict[str, Any]]:
    """A hundred peers with a record each: rounds, and bytes of one peer beside the records' own.

    Raises RuntimeError where they do not end with one state.
    """
    found = convergence(peers=100, records=100, fanout=3, seed=1)
    if len(set(found.state_ids)) != 1:
        raise RuntimeError(f"no agreement after {found.rounds} rounds")
    told = {"peers": found.peers, "records": found.records, "state": found.state_ids[0]}
    most = {"most_bytes": found.most_bytes, "calls": found.calls}
    least = math.ceil(math.log(found.peers, 2 + 3))  # pushed to three, and one exchange: a fifth
    return [
        _row("gossip_rounds", found.rounds, "rounds", least, told),
        _row("gossip_bytes", found.mean_bytes, "bytes a peer", found.payload_bytes, told | most),
    ]


def _row(
    case: str, value: float, unit: str, baseline: float, told: dict[str, Any]
) -> dict[str, Any]:
    ratio = value / baseline
    return {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": ratio,
        "bar": None,
        **told,
    }
