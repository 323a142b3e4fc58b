"""A peer: makes records of its own steps, gossips everybody's, and has the same model as they.

One thread trains, one gossips, and the server's threads answer; the gossip's lock guards the
ledger.  What is acknowledged or sent is durable before; after a crash the same command goes on.
A peer that does not answer is no fault.  Any other error, in whichever thread, ends the peer, and
`work` raises it: memory may then be ahead of the disk, and the next start begins from the disk.

A peer's folder holds `records.db` (see record_store), `charter.json`, `events.jsonl`,
`status.json`, `adapter/` in PEFT's format, and `inbox/`, into which introductions are dropped.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from ..errors import FormatError, IdentityError, JournalError, PeerError
from ..events import Observer
from ..identity import Identity
from ..store import Disk
from ..strategies.chain import Outcome
from ..strategies.charter import Charter, Member
from ..strategies.checkpoint import Checkpoint
from ..strategies.introductions import Introduction
from ..strategies.ledger import Item, Kind, record_item
from ..strategies.peer_keys import peer_of
from ..strategies.records import LAST_STEP
from .address_book import AddressBook
from .gossip import Gossip
from .peer_checkpoints import VERBS as CHECKPOINT_VERBS
from .peer_checkpoints import Checkpoints, History, fetch
from .peer_inbox import Inbox
from .peer_log import PeerLog, counted
from .peer_memory import awaited, base_of, entry_of, recall, refuse_lost_records, twin_of
from .peer_server import PeerServer
from .peer_steps import Made, Stepper
from .peer_tls import certificate_of
from .peer_transport import GrpcTransport
from .record_store import RecordStore
from .workbench import Workbench

CHARTER = "charter.json"
INBOX = "inbox"
ADAPTER = "adapter"
_RETRIES = 3
_MOST_GREETED = 16


class Peer:
    """One member of a run.  Use it in a `with` statement: `start`, then `work`."""

    def __init__(
        self,
        charter_file: bytes,
        identity: Identity,
        stepper: Stepper,
        bench: Workbench,
        folder: Path,
        observer: Observer = lambda event: None,
        disk: Disk | None = None,
    ) -> None:
        """Raises JournalError where the folder is another peer's or run's, in use, or old."""
        self.charter = Charter.read(charter_file)
        self.identity, self.stepper, self.bench = identity, stepper, bench
        self.folder, self.disk = folder, disk or Disk()
        self.settings = stepper.config.peer
        self.me = peer_of(identity)
        self.book = AddressBook()
        self._stopping, self._ready, self._news = (threading.Event() for _ in range(3))
        self._fault: BaseException | None = None
        self._loss: dict[str, float] = {}
        self._said: set[str] = set()
        self._reported: tuple[str, int] | None = None  # state id, records
        with ExitStack() as resources:
            self._open(charter_file, observer, resources)
            self._resources = resources.pop_all()

    def _open(self, charter_file: bytes, observer: Observer, resources: ExitStack) -> None:
        """The folder, once it is known to be this peer's, and the network."""
        store = RecordStore.open(self.folder, self.charter.run, self.me, self.disk)
        self.store = resources.enter_context(store)
        self.disk.folder(self.folder / INBOX)
        self.disk.write(self.folder / CHARTER, charter_file)
        ledger = recall(self.charter, self.store)
        refuse_lost_records(ledger, self.store, self.me)
        self.log = resources.enter_context(PeerLog(self.folder, observer, self.disk))
        certificate = certificate_of(self.identity)
        self.transport = resources.enter_context(GrpcTransport(certificate, self.book))
        self.gossip = Gossip(ledger, self.transport, Random(), self.me, self._keep)
        self.checkpoints = Checkpoints(
            self.gossip, self.transport, self.store, self.identity, self.settings.witnesses
        )
        base = base_of(ledger, self.store)
        self._history = self._behind(base) if base is not None else None
        self.server = PeerServer(certificate, self.book, self._answer)
        self.inbox = Inbox(self.folder / INBOX, self.disk, self.gossip.publish, self.log.notice)
        for member in ledger.members.values():
            self._enter(member)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._resources.close()

    # --- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Answer others, if asked to, and begin to gossip.  Raises PeerError, FormatError for an
        address that cannot be listened at."""
        if self.settings.listen:
            address = self.server.start(self.settings.listen)
            self._resources.callback(self.server.stop)
            self.log.tell("listening", {"address": address})
        thread = threading.Thread(target=self._gossip, name="meadow-gossip", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(self.transport.close)  # so that no call has to be waited for
        if not self._is_member():
            self.log.notice(f"peer {self.me.hex()[:16]} waits until a member introduces it")

    def stop(self) -> None:
        """End training after the record at hand, and the gossip."""
        self._stopping.set()
        self._ready.set()
        self._news.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def work(self) -> None:
        """Make records until there are enough of them; then gossip on until `stop` is called.

        Raises what ended the peer, if anything but `stop` did.
        """
        self.report()
        self._ready.wait()
        while not self.stopping and not self._done():
            self.step()
        if not self.stopping:
            self.log.notice(f"{self._done()}: it only gossips now")
        while not self._stopping.wait(self.settings.sync_seconds):
            self._follow()
        if self._fault is not None:
            raise self._fault

    def _fail(self, error: BaseException) -> None:
        """End the peer; the first error is the one that `work` raises."""
        self._fault = self._fault or error
        self.stop()

    def _done(self) -> str:
        """Why this peer makes no further record; empty while it does."""
        with self.gossip.lock:
            own = self.gossip.ledger.head(self.me)
        if self.settings.records and own.count >= self.settings.records:
            return f"all {self.settings.records} records of this peer are made"
        if own.steps + self.settings.steps > LAST_STEP:
            return f"this peer has made the {own.steps} steps that one peer can make in a run"
        return ""

    def _is_member(self) -> bool:
        with self.gossip.lock:
            return self.gossip.ledger.is_member(self.me)

    # --- records ----------------------------------------------------------------------------

    def step(self) -> Made:
        """One record: measured, kept, then sent.

        Raises PeerError for a peer that nobody has introduced: its record would count nowhere; and
        JournalError for one whose newest record followed others that are not here.
        """
        if not self._is_member():
            raise PeerError("this peer is no member of the run", "a member has to introduce it")
        waiting = self._waiting()
        if waiting:
            raise JournalError(waiting, "let it exchange with a peer that holds them")
        with self.gossip.lock:
            ledger = self.gossip.ledger
            q, head, heads = ledger.q, ledger.head(self.me), ledger.heads
            active = len({*heads, self.me} - {*ledger.excluded})
        made = self.stepper.make(q, head, active)
        cut = {peer.hex(): each.count for peer, each in heads.items()}
        self.log.tell("record", _told(made, cut), made.record.sequence)
        self.send(made)
        every = self.settings.evaluate_every
        if every and (made.record.sequence + 1) % every == 0:
            self.report()
        return made

    def send(self, made: Made) -> None:
        """Keep an own record, then let it go: the other order could end in two of one number."""
        self.store.append_own(entry_of(record_item(made.record)))
        added = self.gossip.publish(Kind.RECORD, made.record.encoded)
        if added.outcome is Outcome.REFUSED and added.error is not None:
            raise added.error
        self._news.set()

    # --- gossip -----------------------------------------------------------------------------

    def _gossip(self) -> None:
        try:
            self._greet()
            while not self.stopping:
                self.exchange()
                self._begin()
                if self._news.wait(self.settings.sync_seconds):
                    self._news.clear()
        except BaseException as error:  # a thread's end is silent otherwise
            self._fail(error)

    def _begin(self) -> None:
        """Let the training begin, where what it makes can count."""
        if self._ready.is_set():
            return
        waiting = self._waiting()
        if waiting:
            self._tell_once(waiting)
        elif self._is_member():
            self._ready.set()

    def _waiting(self) -> str:
        """What an old copy of a folder waits for, which heard of its newest record first."""
        with self.gossip.lock:
            missing = awaited(self.gossip.ledger, self.store, self.me)
        if not missing:
            return ""
        return f"this peer waits for records {missing[0]} to {missing[-1]} of its own from others"

    def _answer(self, caller: bytes, verb: str, request: bytes) -> bytes:
        if verb in CHECKPOINT_VERBS:
            return self.checkpoints.answer(caller, verb, request)
        return self.gossip.handle(caller, verb, request)

    def _greet(self) -> None:
        """Hear from others before the first step: they know if this folder is an old copy."""
        answered = 0
        self._catch_up()
        for peer in self.gossip.partners(_MOST_GREETED):
            if self.stopping or answered == self.settings.fanout:
                break
            answered += self._sync(peer)

    def exchange(self) -> None:
        """Take in what was dropped, push what is new, and compare with one peer at random."""
        self.inbox.read()
        self._catch_up()
        # whom this does not reach hears by comparing, where it is told who does not answer
        self.gossip.spread(self.settings.fanout)
        for peer in self.gossip.partners(1):
            self._sync(peer)
        self._audit()
        with self.gossip.lock:
            members = len(self.gossip.ledger.members)
        self.checkpoints.gather(records=members)
        self._show()

    def _catch_up(self) -> None:
        """One who joins late starts from a checkpoint, and fetches the history behind its work."""
        founders = {member.peer for member in self.charter.founders}
        with self.gossip.lock:
            ledger = self.gossip.ledger
            empty = ledger.base is None and not ledger.heads
        if self.me in founders or not empty:
            return
        found = fetch(self.gossip, self.transport, self.settings.witnesses, self._tell_once)
        if found is not None:
            self._history = History.begin(found, self.gossip, self.transport, self.store, self.me)
            told = {"records": found.records, "bytes": len(found.encoded)}
            self.log.tell("checkpoint", told)

    def _behind(self, checkpoint: Checkpoint) -> History:
        return History(checkpoint, self.gossip, self.transport, self.store, self.me)

    def _tell_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.log.notice(text)

    def _audit(self) -> None:
        """Go on with the history behind a checkpoint, if there is one."""
        try:
            found = self._history.advance() if self._history is not None else ""
        except PeerError:  # the exchange before it has told
            return
        if found:
            self._history = None
            self.log.notice(found)

    def _sync(self, peer: bytes) -> bool:
        """Whether it answered.  It may be off, or behind a router: others have its records."""
        try:
            for _ in range(_RETRIES):
                if self.gossip.sync(peer).complete:
                    break
        except PeerError as fault:
            if not self.stopping:
                self.log.heard(peer, fault)
            return False
        self.log.heard(peer, None)
        return True

    def _keep(self, items: Sequence[Item]) -> None:
        """What came is durable, and whom it introduces can connect, before it is acknowledged."""
        try:
            signed = self.store.signed()
            self.store.append([entry_of(item) for item in items])
            for item in items:
                if item.kind is Kind.INTRODUCTION:
                    self._enter(Introduction.decode(item.data, self.charter.run).member)
                elif item.peer == self.me and (error := twin_of(item, signed)) is not None:
                    self._fail(error)
        except BaseException as error:
            self._fail(error)
            raise

    def _enter(self, member: Member) -> None:
        """A member without a valid certificate stays one; it only cannot connect."""
        try:
            self.book.put(member.peer, member.certificate, member.address)
        except (IdentityError, FormatError) as error:
            self.log.notice(str(error))

    # --- what it shows ----------------------------------------------------------------------

    def report(self) -> None:
        """Export the adapter, and measure the held-out loss, unless that was done for this state.

        Raises UpdateError where Q has overflowed.
        """
        with self.gossip.lock:
            ledger = self.gossip.ledger
            if ledger.overtaken:  # the history is on its way; until then Q is not the run's
                return
            q, state, records = ledger.q, ledger.state_id, self._counted()
        if self._reported is not None and self._reported[0] == state:
            return
        pool, config = self.charter.pool, self.stepper.config
        tree = pool.adapter(q, config.scaling)
        self.bench.blueprint.export(config, tree, self.folder / ADAPTER, pool.run_id, self.disk)
        if self.settings.evaluate_every:
            measured = self.stepper.measure(q)
            usable = measured.tokens and math.isfinite(measured.loss)
            self._loss = {"loss": measured.loss} if usable else {}
        self.log.tell("measured", {"state": state, "records": records, **self._loss})
        self._reported = state, records
        self._show()

    def _follow(self) -> None:
        """Report on others' records, as often as on own ones."""
        with self.gossip.lock:
            records = self._counted()
        every, done = self.settings.evaluate_every, self._reported[1] if self._reported else 0
        if every and records - done >= every:
            self.report()

    def _counted(self) -> int:
        return sum(head.count for head in self.gossip.ledger.heads.values())

    def status(self) -> dict[str, Any]:
        """Where this peer stands, for people and scripts."""
        with self.gossip.lock:
            ledger = self.gossip.ledger
            return {
                "peer": self.me.hex(),
                "state": None if ledger.overtaken else ledger.state_id,
                "own_records": ledger.head(self.me).count,
                "records": self._counted(),
                "members": len(ledger.members),
                "excluded": {peer.hex(): end for peer, end in ledger.excluded.items()},
                "counted": counted(ledger.tally, self.server.refusals()),
                **self._loss,
            }

    def _show(self) -> None:
        self.log.show(self.status())


def _told(made: Made, cut: dict[str, int]) -> dict[str, Any]:
    """A record's event: `cut` is the model that it was measured on, in records of each peer."""
    walked = made.walked
    told = {
        "cut": cut,
        "shift": made.record.shift,
        "saturated": walked.saturated,
        "lost": walked.lost,
    }
    return told | ({"loss": walked.loss} if math.isfinite(walked.loss) else {})
