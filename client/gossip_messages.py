"""What gossiping peers say to each other, as bytes.

Every request starts with the format version and the charter's digest, so that a peer of another
run, with another base or of another version is refused by name before anything else is looked at.
Whoever calls learns who answers from the transport, and the other way round.

    verb      request                                          answer
    compare   nonce, members' digest, a sketch of each entry   the entries that differ
    pull      what is wanted                                   items, as many as fit
    push      items                                            an outcome for each
    digests   a peer, and places in its chain                  the chain's digests there
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import RecordError
from ..strategies.chain import Outcome
from ..strategies.charter import MOST_MEMBERS
from ..strategies.ledger import Item, Kind, Ledger
from ..strategies.peer_keys import KEY
from ..strategies.records import START, Reason

FORMAT = 1
MOST_BYTES = 2**19  # of a request or an answer: the entries of 4,096 members fit
MOST_PLACES = 32  # in one question for digests
NEVER = 2**32 - 1  # the sequence number of a fork that nobody has proven

_HEADER = 1 + 32
_NONCE = 8
_SKETCH = 4
_ENTRY = struct.Struct("<32sIII32s")
_WANT = struct.Struct("<B32sII")
_ITEM = struct.Struct("<BH")
_PLACE = struct.Struct("<I")
_OUTCOMES = tuple(Outcome)


# --- requests as a whole -----------------------------------------------------------------------


def seal(charter_digest: bytes, body: bytes) -> bytes:
    """A request: header and body."""
    return bytes([FORMAT]) + charter_digest + body


def unseal(charter_digest: bytes, request: bytes) -> bytes:
    """The body of a request of the same charter.  Raises RecordError."""
    within(request)
    if request[:1] != bytes([FORMAT]):
        raise RecordError(
            Reason.VERSION,
            f"the message has format {request[:1].hex() or 'none'}, this meadow reads {FORMAT:02x}",
            "install the same version of meadow on all peers",
        )
    if request[1:_HEADER] != charter_digest:
        raise RecordError(
            Reason.CHARTER,
            "the message comes from a peer with another charter: another run, base or pool",
            "give all peers the same charter file",
        )
    return request[_HEADER:]


def within(data: bytes) -> bytes:
    """`data` unless it is too large.  Raises RecordError."""
    if len(data) > MOST_BYTES:
        raise _malformed(f"the message has {len(data)} bytes, at most {MOST_BYTES} are read")
    return data


# --- compare -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What one peer knows of one member's chain."""

    peer: bytes
    count: int = 0  # records that count
    start: int = 0  # of these, how many a checkpoint stands for: they cannot be had here
    end: int = NEVER  # the sequence number of its proven fork
    head: bytes = START  # digest of the last record that counts

    @classmethod
    def of(cls, ledger: Ledger, peer: bytes) -> Entry:
        chain = ledger.chain(peer)
        end = NEVER if chain.end is None else chain.end
        return cls(peer, chain.head.count, chain.start.count, end, chain.head.digest)

    def sketch(self, nonce: bytes) -> bytes:
        """Four bytes that differ where the state does.

        A fresh nonce for each question: nobody can choose two chains that always look alike.
        """
        state = _ENTRY.pack(self.peer, self.count, 0, self.end, self.head)
        return hashlib.sha256(nonce + state).digest()[:_SKETCH]

    @property
    def encoded(self) -> bytes:
        return _ENTRY.pack(self.peer, self.count, self.start, self.end, self.head)


def members_digest(entries: Iterable[Entry]) -> bytes:
    return hashlib.sha256(b"".join(entry.peer for entry in entries)).digest()


def encode_comparison(entries: Sequence[Entry], nonce: bytes) -> bytes:
    """`entries` are sorted by peer."""
    sketches = b"".join(entry.sketch(nonce) for entry in entries)
    return nonce + members_digest(entries) + sketches


def differing(entries: Sequence[Entry], comparison: bytes) -> tuple[bool, list[Entry]]:
    """Of one's own entries, those that the asker lacks or has otherwise.

    True with the differing entries where both know the same members, else False with all.
    """
    nonce, digest = comparison[:_NONCE], comparison[_NONCE : _NONCE + 32]
    sketches = comparison[_NONCE + 32 :]
    if len(nonce) + len(digest) != _NONCE + 32 or len(sketches) % _SKETCH:
        raise _malformed("the comparison is cut off")
    if digest != members_digest(entries) or len(sketches) != _SKETCH * len(entries):
        return False, list(entries)
    theirs = _split(sketches, _SKETCH)
    return True, [
        mine for mine, their in zip(entries, theirs, strict=True) if mine.sketch(nonce) != their
    ]


def encode_entries(same_members: bool, entries: Iterable[Entry]) -> bytes:
    return bytes([same_members]) + b"".join(entry.encoded for entry in entries)


def decode_entries(answer: bytes) -> tuple[bool, list[Entry]]:
    """Whether both know the same members, and the entries.  Raises RecordError."""
    flag, rest = within(answer)[:1], answer[1:]
    if flag not in (b"\0", b"\1") or len(rest) % _ENTRY.size:
        raise _malformed("the list of chains is cut off")
    entries = [Entry(*fields) for fields in _ENTRY.iter_unpack(rest)]
    peers = [entry.peer for entry in entries]
    if len(peers) > MOST_MEMBERS or peers != sorted(set(peers)):
        raise _malformed("the list of chains is too long, unsorted or names a peer twice")
    if any(entry.start > entry.count for entry in entries):
        raise _malformed("the list of chains contradicts itself")
    return flag == b"\1", entries


# --- pull and push -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Want:
    """Something of a peer; for records, sequence numbers from `start` up to, not including."""

    kind: Kind
    peer: bytes
    start: int = 0
    stop: int = 0


def encode_wants(wants: Iterable[Want]) -> bytes:
    return b"".join(_WANT.pack(each.kind, each.peer, each.start, each.stop) for each in wants)


def decode_wants(body: bytes) -> list[Want]:
    if len(body) % _WANT.size:
        raise _malformed("the list of wants is cut off")
    return [Want(_kind(kind), *rest) for kind, *rest in _WANT.iter_unpack(body)]


def encode_item(item: Item) -> bytes:
    return _ITEM.pack(item.kind, len(item.data)) + item.data


def pages(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lots that fit one message."""
    page: list[Item] = []
    size = 0
    for item in items:
        more = _ITEM.size + len(item.data)
        if page and size + more > MOST_BYTES - _HEADER:
            yield page
            page, size = [], 0
        page.append(item)
        size += more
    if page:
        yield page


def encode_items(items: Iterable[Item]) -> bytes:
    return b"".join(map(encode_item, items))


def decode_items(body: bytes) -> list[tuple[Kind, bytes]]:
    """Kinds and bytes, of which only the lengths were checked.  Raises RecordError."""
    within(body)
    items, place = [], 0
    while place < len(body):
        if place + _ITEM.size > len(body):
            raise _malformed("the list of items is cut off")
        kind, length = _ITEM.unpack_from(body, place)
        data = body[place + _ITEM.size : place + _ITEM.size + length]
        if len(data) != length:
            raise _malformed("the list of items is cut off")
        items.append((_kind(kind), data))
        place += _ITEM.size + length
    return items


def encode_outcomes(outcomes: Iterable[Outcome]) -> bytes:
    return bytes(map(_OUTCOMES.index, outcomes))


def decode_outcomes(answer: bytes, count: int) -> list[Outcome]:
    if len(answer) != count or any(code >= len(_OUTCOMES) for code in answer):
        raise _malformed(f"{count} items were answered with {len(answer)} outcomes")
    return [_OUTCOMES[code] for code in answer]


def _kind(code: int) -> Kind:
    try:
        return Kind(code)
    except ValueError as error:
        raise _malformed(f"the message speaks of kind {code}, which is unknown") from error


# --- digests -----------------------------------------------------------------------------------


def spaced(low: int, high: int) -> list[int]:
    """Places from `low` to `high`, both included, evenly spaced: as many as one question holds."""
    parts = MOST_PLACES - 1
    return sorted({low + (high - low) * part // parts for part in range(parts + 1)})


def encode_places(peer: bytes, counts: Iterable[int]) -> bytes:
    return peer + b"".join(map(_PLACE.pack, counts))


def decode_places(body: bytes) -> tuple[bytes, list[int]]:
    peer, rest = body[:KEY], body[KEY:]
    if len(peer) != KEY or len(rest) % _PLACE.size or len(rest) > MOST_PLACES * _PLACE.size:
        raise _malformed("the question for digests is cut off or too long")
    return peer, [count for (count,) in _PLACE.iter_unpack(rest)]


def decode_digests(answer: bytes, count: int) -> list[bytes]:
    if len(answer) != count * 32:
        raise _malformed(f"{count} digests were asked for, {len(answer)} bytes came")
    return _split(answer, 32)


def _split(data: bytes, size: int) -> list[bytes]:
    return [data[place : place + size] for place in range(0, len(data), size)]


def _malformed(text: str) -> RecordError:
    return RecordError(Reason.MALFORMED, text)
