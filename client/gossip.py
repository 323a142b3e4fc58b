"""Gossip: how records, introductions and proofs reach every peer, whatever is lost on the way.

Fresh records are pushed to a few peers at random, who push them on; that is quick and may miss
some.  Anti-entropy misses nothing: two peers compare what they know of each chain, find where
their views part, and each gives what the other lacks.  One side calls and the other answers, so
that a peer which nobody can call takes part fully.  Everything is safe to repeat, lose or reorder.

Where the two hold different chains of one peer, the last place at which they agree is searched by
digests; the records after it prove the fork.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Protocol

from ..errors import PeerError, RecordError
from ..strategies.chain import Outcome
from ..strategies.ledger import Added, Item, Kind, Ledger, proof_item, record_item
from ..strategies.records import START, Reason
from . import gossip_messages as messages
from .gossip_messages import Entry, Want
from .peer_limits import Clock

MOST_PAGES = 64  # each way, in one exchange
MOST_SEARCHES = 16  # for forks, in one exchange
MOST_FRESH = 4096  # items that wait to be pushed on
MOST_SECONDS = 120.0  # of one exchange, however late each call of it is answered

Keep = Callable[[Sequence[Item]], None]
"""Called with what a message brought that is new, in order, before the message is answered."""


class Transport(Protocol):
    """How requests reach other peers."""

    def call(self, peer: bytes, verb: str, body: bytes) -> bytes:
        """The answer of `peer`.  Raises PeerError where there is none."""


@dataclass
class Synced:
    """What one exchange did."""

    pulled: int = 0  # items that were new here
    pushed: int = 0  # items that were new there
    forks: int = 0  # found by comparing
    complete: bool = True  # nothing that the other side offered is left to fetch or to give
    whole: bool = True  # the other side has the records that were asked for, not a checkpoint


class Gossip:
    """One peer's part in the gossip about one ledger.

    `handle` may be called from any thread, what calls others from one.  `lock` guards the ledger
    and is never held while another peer is called; whoever else touches the ledger takes it too.
    """

    def __init__(
        self,
        ledger: Ledger,
        transport: Transport,
        rng: Random,
        me: bytes,
        keep: Keep = lambda items: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.lock = threading.RLock()
        self._transport = transport
        self._rng = rng
        self.me = me
        self._keep = keep
        self._clock, self._until = clock, math.inf
        self._fresh: deque[Item] = deque(maxlen=MOST_FRESH)
        self._answers = {
            "compare": self._answer_compare,
            "pull": self._answer_pull,
            "push": self._answer_push,
            "digests": self._answer_digests,
        }

    # --- fresh records ----------------------------------------------------------------------

    def publish(self, kind: Kind, data: bytes) -> Added:
        """Take in something of one's own, and have the next `spread` push it."""
        return self._take([(kind, data)], self.me, pass_on=True)[0]

    def partners(self, count: int) -> list[bytes]:
        """Up to `count` other members that can be called, at random."""
        with self.lock:
            members = sorted(self.ledger.members.items())
        others = [peer for peer, member in members if member.reachable and peer != self.me]
        return self._rng.sample(others, min(count, len(others)))

    def spread(self, fanout: int) -> list[PeerError]:
        """Push what is fresh to `fanout` peers, once; the faults of those that were not reached.

        What they miss they get by anti-entropy.
        """
        with self.lock:
            items = list(self._fresh)
            self._fresh.clear()
        faults = []
        for peer in self.partners(fanout) if items else ():
            try:
                for page in messages.pages(items):
                    self._give(peer, page)
            except PeerError as fault:
                faults.append(fault)
        return faults

    # --- anti-entropy: the side that calls ------------------------------------------------------

    def sync(self, peer: bytes) -> Synced:
        """One exchange in both directions.

        Raises PeerError where the other side cannot be reached, refuses, takes too long, or answers
        with what is not one; what was exchanged until then stays.
        """
        done = Synced()
        with self._in_time():
            same_members, theirs = self._compare(peer)
            done.whole = all(their.start == 0 for their in theirs)
            self._fetch(peer, theirs, done)
            parted = self._parted(theirs)
            for their in self._rng.sample(parted, min(MOST_SEARCHES, len(parted))):
                self._search(peer, their, done)
            done.complete = not self._wants(theirs) and not self._parted(theirs)
            self._offer(peer, theirs, same_members, done)
        return done

    def _compare(self, peer: bytes) -> tuple[bool, list[Entry]]:
        nonce = self._rng.randbytes(8)
        with self.lock:
            body = messages.encode_comparison(self._entries(), nonce)
        with self._understood(peer):
            return messages.decode_entries(self._call(peer, "compare", body))

    def meet(self, peer: bytes) -> None:
        """Learn from `peer` who the members are, and nothing else: a joiner's first call.

        Raises PeerError as `sync` does.
        """
        with self._in_time():
            _, theirs = self._compare(peer)
            self._fetch(peer, theirs, Synced(), {Kind.INTRODUCTION})

    def _fetch(
        self,
        peer: bytes,
        theirs: Sequence[Entry],
        done: Synced,
        kinds: Collection[Kind] = frozenset(Kind),
    ) -> None:
        """Pull, page by page, until nothing is wanted or the other side gives no more of it."""
        wants: list[Want] = []
        for _ in range(MOST_PAGES):
            before = wants
            wants = [want for want in self._wants(theirs) if want.kind in kinds]
            if not wants or wants == before:
                break
            done.pulled += self._pull(peer, wants)

    def _pull(self, peer: bytes, wants: Sequence[Want]) -> int:
        """How many of the items that came were new."""
        with self._understood(peer):
            answer = self._call(peer, "pull", messages.encode_wants(wants))
            items = messages.decode_items(answer)
        return sum(added.kept for added in self._take(items, peer, pass_on=False))

    def _wants(self, theirs: Iterable[Entry]) -> list[Want]:
        with self.lock:
            return [want for their in theirs for want in self._wants_of(their)]

    def _wants_of(self, their: Entry) -> Iterator[Want]:
        """What the other side's view of one chain has beyond the own."""
        if not self.ledger.is_member(their.peer):
            yield Want(Kind.INTRODUCTION, their.peer)
        mine = Entry.of(self.ledger, their.peer)
        if their.end < mine.end:
            yield Want(Kind.PROOF, their.peer)
        stop = min(their.count, their.end, mine.end)
        if max(mine.count, their.start) < stop and their.start <= mine.count:
            yield Want(Kind.RECORD, their.peer, mine.count, stop)

    # --- forks ------------------------------------------------------------------------------------

    def _parted(self, theirs: Iterable[Entry]) -> list[Entry]:
        """Chains of which the other side may hold another branch."""
        with self.lock:
            return [their for their in theirs if self._parts(their)]

    def _parts(self, their: Entry) -> bool:
        """Whether the two chains cannot be one, or the next record does not fit to the own head."""
        chain = self.ledger.chain(their.peer)
        known = chain.head_at(their.count)
        if known is not None:
            return known.digest != their.head
        return their.count > chain.head.count and chain.at(chain.head.count) is not None

    def _search(self, peer: bytes, their: Entry, done: Synced) -> None:
        """Find the first record in which two chains of one peer differ, and fetch it.

        Each question leaves a thirtieth of the places; among 2^24 it takes five.
        """
        with self.lock:
            mine = Entry.of(self.ledger, their.peer)
        low, high = max(mine.start, their.start), min(mine.count, their.count)
        while low < high:
            places = messages.spaced(low, high)
            first = self._first_difference(peer, their.peer, places)
            if not first:  # the views have changed meanwhile, or part before a checkpoint
                return
            low, high = places[first - 1], places[first]
            if high - low == 1:
                done.forks += self._prove(peer, Want(Kind.RECORD, their.peer, low, high), done)
                return

    def _first_difference(self, peer: bytes, about: bytes, places: Sequence[int]) -> int:
        """The index of the first place at which the two chains of `about` differ; 0 if none."""
        with self._understood(peer):
            answer = self._call(peer, "digests", messages.encode_places(about, places))
            theirs = messages.decode_digests(answer, len(places))
        with self.lock:
            mine = self._digests(about, places)
        different = (index for index in range(len(places)) if mine[index] != theirs[index])
        return next(different, 0)

    def _prove(self, peer: bytes, want: Want, done: Synced) -> bool:
        """Fetch a record that should contradict the own one; whether it does."""
        done.pulled += self._pull(peer, [want])
        with self.lock:
            proven = Entry.of(self.ledger, want.peer).end <= want.start
            if not proven:
                self.ledger.tally[Reason.WITHHELD, peer] += 1
        return proven

    # --- giving -----------------------------------------------------------------------------------

    def _offer(
        self, peer: bytes, theirs: Sequence[Entry], same_members: bool, done: Synced
    ) -> None:
        """Push, page by page, what the other side lacks."""
        with self.lock:
            gifts = self._gifts(theirs, same_members)
        pages = messages.pages(item for gift in gifts for item in self._items_of(gift))
        for page in islice(pages, MOST_PAGES):
            outcomes = self._give(peer, page)
            done.pushed += sum(outcome in (Outcome.NEW, Outcome.PENDING) for outcome in outcomes)
            if set(outcomes) == {Outcome.REFUSED}:
                break
        done.complete &= next(pages, None) is None

    def _gifts(self, theirs: Sequence[Entry], same_members: bool) -> list[Want]:
        """What the own view has beyond the other side's, introductions first."""
        listed = {their.peer for their in theirs}
        missing = [] if same_members else self._unlisted(listed)
        gifts = [Want(Kind.INTRODUCTION, peer) for peer in missing]
        for their in (*theirs, *map(Entry, missing)):
            gifts.extend(self._gifts_of(their))
        return gifts

    def _unlisted(self, listed: Collection[bytes]) -> list[bytes]:
        """Members that the other side does not know, each after its introducer."""
        return [peer for peer in self.ledger.introduced if peer not in listed]

    def _gifts_of(self, their: Entry) -> Iterator[Want]:
        mine = Entry.of(self.ledger, their.peer)
        if mine.end < their.end:
            yield Want(Kind.PROOF, their.peer)
        agreed = self.ledger.chain(their.peer).head_at(their.count)
        stop = min(mine.count, their.end)
        if agreed is not None and agreed.digest == their.head and their.count < stop:
            yield Want(Kind.RECORD, their.peer, their.count, stop)

    def _give(self, peer: bytes, page: Sequence[Item]) -> list[Outcome]:
        with self._understood(peer):
            answer = self._call(peer, "push", messages.encode_items(page))
            return messages.decode_outcomes(answer, len(page))

    def _items_of(self, want: Want) -> Iterator[Item]:
        """What is there of something wanted; the lock is not held from one item to the next."""
        for sequence in range(want.start, want.stop) if want.kind is Kind.RECORD else (0,):
            with self.lock:
                item = self._item(want.kind, want.peer, sequence)
            if item is None:
                return
            yield item

    def _item(self, kind: Kind, peer: bytes, sequence: int) -> Item | None:
        chain = self.ledger.chain(peer)
        if kind is Kind.INTRODUCTION:
            data = self.ledger.introduction(peer)
            return Item(kind, data, peer) if data else None
        if kind is Kind.PROOF:
            return proof_item(chain.proof) if chain.proof else None
        record = chain.at(sequence) if sequence < chain.head.count else None
        return record_item(record) if record else None

    # --- the side that answers --------------------------------------------------------------------

    def handle(self, caller: bytes, verb: str, request: bytes) -> bytes:
        """Answer a request of an authenticated peer.

        Raises PeerError for a caller that is no member and RecordError for a request that cannot
        be read; both are counted, and change nothing.
        """
        with self.lock:
            if not self.ledger.is_member(caller):
                self.ledger.tally[Reason.STRANGER, b""] += 1
                raise PeerError(
                    f"peer {caller.hex()[:16]} is no member of this run",
                    "one of its members has to introduce it",
                )
            try:
                if verb not in self._answers:
                    raise RecordError(Reason.MALFORMED, f"there is no verb {verb[:40]!r}")
                body = messages.unseal(self.ledger.charter.digest, request)
                return self._answers[verb](caller, body)
            except RecordError as error:
                self.ledger.tally[error.reason, caller] += 1
                raise

    def _answer_compare(self, caller: bytes, body: bytes) -> bytes:
        return messages.encode_entries(*messages.differing(self._entries(), body))

    def _answer_pull(self, caller: bytes, body: bytes) -> bytes:
        wants = messages.decode_wants(body)
        asked = {want.peer for want in wants if want.kind is Kind.INTRODUCTION}
        ordered = [Want(Kind.INTRODUCTION, p) for p in self.ledger.introduced if p in asked]
        ordered += [want for want in wants if want.kind is not Kind.INTRODUCTION]
        pages = messages.pages(item for want in ordered for item in self._items_of(want))
        return messages.encode_items(next(pages, []))

    def _answer_push(self, caller: bytes, body: bytes) -> bytes:
        added = self._take(messages.decode_items(body), caller, pass_on=True)
        return messages.encode_outcomes(each.outcome for each in added)

    def _answer_digests(self, caller: bytes, body: bytes) -> bytes:
        return b"".join(self._digests(*messages.decode_places(body)))

    # --- what both sides use ----------------------------------------------------------------------

    def _entries(self) -> list[Entry]:
        return [Entry.of(self.ledger, peer) for peer in sorted(self.ledger.members)]

    def _digests(self, peer: bytes, counts: Iterable[int]) -> list[bytes]:
        """The digests of a chain's first `counts` records; zeros where they are not known."""
        chain = self.ledger.chain(peer)
        heads = (chain.head_at(count) for count in counts)
        return [head.digest if head else START for head in heads]

    def _take(
        self, items: Iterable[tuple[Kind, bytes]], sender: bytes, pass_on: bool
    ) -> list[Added]:
        """Add, keep what is new, and remember what to push on: all of it, or the proofs alone."""
        with self.lock:
            added = [self.ledger.add(kind, data, sender) for kind, data in items]
            news = [each.item for each in added if each.kept and each.item]
            if news:
                self._keep(news)
            self._fresh.extend(item for item in news if pass_on or item.kind is Kind.PROOF)
        return added

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        self._until = self._clock() + MOST_SECONDS
        try:
            yield
        finally:
            self._until = math.inf

    def _call(self, peer: bytes, verb: str, body: bytes) -> bytes:
        if self._clock() > self._until:
            raise PeerError(
                f"peer {peer.hex()[:16]} is slow: an exchange took over {MOST_SECONDS:.0f} s"
            )
        return self._transport.call(peer, verb, messages.seal(self.ledger.charter.digest, body))

    @contextmanager
    def _understood(self, peer: bytes) -> Iterator[None]:
        """Count what cannot be read of `peer`'s answer, and raise PeerError."""
        try:
            yield
        except RecordError as error:
            with self.lock:
                self.ledger.tally[error.reason, peer] += 1
            raise PeerError(
                f"peer {peer.hex()[:16]} answered what cannot be read: {error}"
            ) from error
