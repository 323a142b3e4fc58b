"""Between a ledger and its durable store: what each calls the other's things."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from ..errors import JournalError
from ..store import digest_of
from ..strategies.charter import Charter
from ..strategies.checkpoint import Checkpoint
from ..strategies.ledger import Item, Kind, Ledger
from ..strategies.peer_keys import SIGNATURE
from ..strategies.records import Reason
from .record_store import Entry, RecordStore, owner_of
from .record_store import Kind as Stored

_NAMES: dict[Kind, Stored] = {
    Kind.RECORD: "record",
    Kind.INTRODUCTION: "introduction",
    Kind.PROOF: "proof",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}
assert {*_KINDS} < {*get_args(Stored)}
BASE, SERVED = 0, 1
"""Sequence numbers of stored checkpoints: the one that the ledger starts from, the one to serve."""

_PASSED_OVER = {Reason.EXCLUDED, Reason.PAST, Reason.AHEAD}
"""Why a stored record may count for nothing: a proof came after it, a checkpoint stands for it, or
too many that wait like it lie before it."""

_ANOTHER = "join the run again with another identity and folder"


def entry_of(item: Item) -> Entry:
    """An item of a ledger as the store keeps it; a record is named by its body alone."""
    body = item.data[:-SIGNATURE] if item.kind is Kind.RECORD else item.data
    name = bytes.fromhex(digest_of(body))
    return Entry(_NAMES[item.kind], name, item.peer, item.sequence, item.data)


def recall(charter: Charter, store: RecordStore) -> Ledger:
    """The ledger that a store's entries make, whatever the order in which they came.

    It counts on from the stored checkpoint where the audit of that one was not yet done.  Raises
    JournalError where an entry that was accepted once is refused now; see `_PASSED_OVER`.
    """
    ledger = Ledger(charter)
    _take_in(ledger, store.entries("introduction"))
    base = base_of(ledger, store)
    if base is not None:
        ledger = base.start(ledger)
    _take_in(ledger, store.entries("proof"))
    # a record whose predecessors came after it would wait for them, and only so many can wait
    _take_in(ledger, sorted(store.entries("record"), key=lambda entry: entry.sequence))
    ledger.tally.clear()
    return ledger


def base_of(ledger: Ledger, store: RecordStore) -> Checkpoint | None:
    """The stored checkpoint that the ledger starts from until it is audited, if there is one."""
    for entry in store.entries("checkpoint"):
        if entry.sequence == BASE:
            return Checkpoint.decode(entry.data, ledger.charter, ledger.members)
    return None


def _take_in(ledger: Ledger, entries: Iterable[Entry]) -> None:
    for entry in entries:
        added = ledger.add(_KINDS[entry.kind], entry.data)
        if added.error is not None and added.error.reason not in _PASSED_OVER:
            raise JournalError(
                f"the store holds a {entry.kind} that is refused: {added.error}",
                f"restore the folder from a copy, or {_ANOTHER}",
            )


def refuse_lost_records(ledger: Ledger, store: RecordStore, me: bytes) -> None:
    """Raise JournalError where nothing that this peer signs would count.

    It signed a record that the ledger does not know, so that another in its place would fork the
    chain; or the fork is proven already.
    """
    signed, chain = store.signed(), ledger.chain(me)
    if me in ledger.excluded:
        raise JournalError(
            f"two different records {ledger.excluded[me]} of this peer are known: none from there"
            " on counts",
            _ANOTHER,
        )
    if signed is not None and chain.head.count <= signed and chain.at(signed) is None:
        raise JournalError(
            f"this peer has signed {signed + 1} records and {chain.head.count} of them are here",
            f"restore its folder, or {_ANOTHER}",
        )


def awaited(ledger: Ledger, store: RecordStore, me: bytes) -> range:
    """The numbers of own records that do not count yet: the newest is here, and what it follows is
    still with others.  Until it came, none may be signed."""
    signed = store.signed()
    return range(ledger.head(me).count, 0 if signed is None else signed + 1)


def twin_of(item: Item, signed: int | None) -> JournalError | None:
    """Why a peer that has signed its records up to `signed` has to end at this item of its own:
    somebody else signs as it, and a further record might fork its chain.  None for what it knows.
    """
    if item.kind is Kind.PROOF:
        return JournalError(
            f"two different records {item.sequence} of this peer are known: none from there on"
            " counts",
            _ANOTHER,
        )
    if signed is None or item.sequence > signed:
        return JournalError(
            f"others hold record {item.sequence} of this peer, which its folder did not: it is an"
            " old copy, or the identity is at work elsewhere too",
            "stop any other; the same command then goes on from the newest record",
        )
    return None


def read_ledger(charter: Charter, folder: Path) -> Ledger:
    """The ledger of any peer's folder, every signature in it checked once more.

    Raises JournalError where a peer is at work in it.
    """
    with RecordStore.open(folder, charter.run, owner_of(folder)) as store:
        return recall(charter, store)
