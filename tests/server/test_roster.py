"""The roster: who may become what, by which key, and what is written down of it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from enrolment import DAY, Clock, approved, enrolled, new_flower_key, new_key
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from meadow.errors import FormatError, InvitationError, JournalError, MeadowError, RosterError
from meadow.server.participant import Status
from meadow.server.roster import TOUCH_SECONDS, Participant, Roster
from meadow.store import Disk


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, clock: Clock) -> Iterator[Roster]:
    with Roster.open(tmp_path / "home" / "roster.db", clock=clock) as opened:
        yield opened


# --- enrolment ---------------------------------------------------------------------------------


def test_from_invitation_to_approval(roster: Roster, clock: Clock) -> None:
    token = roster.invite("Ward 3", DAY)
    assert len(token) == 16
    assert roster.by_name("Ward 3") == Participant("Ward 3", b"", "invited", "", 0, 0, 0, 0)
    clock.now += 60
    key, flower_key = new_key(), new_flower_key()
    waiting = roster.enrol(token, key, flower_key)
    assert waiting == Participant("Ward 3", key, "pending", flower_key, 0, clock.now, 0, 0)
    done = roster.approve("Ward 3", 2**64 - 1)
    assert (done.status, done.node_id) == ("approved", 2**64 - 1)
    assert roster.by_key(key) == roster.by_name("Ward 3") == done
    assert roster.participants() == [done]
    assert len(done.fingerprint) == 39


def test_a_token_is_kept_only_as_a_hash(roster: Roster, tmp_path: Path) -> None:
    token = roster.invite("a", DAY)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "home").iterdir())
    assert token not in stored and token.hex().encode() not in stored


def test_asking_again_with_the_same_token_and_keys_is_how_one_waits(
    roster: Roster, clock: Clock
) -> None:
    token, key, flower_key = roster.invite("a", DAY), new_key(), new_flower_key()
    first = roster.enrol(token, key, flower_key)
    clock.now += 30 * DAY  # long after the invitation's end
    assert roster.enrol(token, key, flower_key) == first
    roster.approve("a", 1)
    assert roster.enrol(token, key, flower_key).status == "approved"
    assert [note.kind for note in roster.notes()] == ["invited", "enrolled", "approved"]


def test_an_unknown_token(roster: Roster) -> None:
    roster.invite("a", DAY)
    for token in (bytes(16), b""):
        with pytest.raises(InvitationError, match="unknown"):
            roster.enrol(token, new_key(), new_flower_key())


@pytest.mark.parametrize(("late", "good"), [(-0.001, True), (0.0, False), (400 * DAY, False)])
def test_an_invitation_ends_by_the_coordinators_clock(
    roster: Roster, clock: Clock, late: float, good: bool
) -> None:
    token = roster.invite("a", DAY)
    clock.now += DAY + late
    if good:
        assert roster.enrol(token, new_key(), new_flower_key()).status == "pending"
    else:
        with pytest.raises(InvitationError, match="expired"):
            roster.enrol(token, new_key(), new_flower_key())
        assert roster.participants()[0].status == "invited"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_an_invitation_that_never_holds(roster: Roster, seconds: float) -> None:
    with pytest.raises(InvitationError):
        roster.invite("a", seconds)


def test_a_token_is_good_for_one_key(roster: Roster) -> None:
    token, flower_key = roster.invite("a", DAY), new_flower_key()
    first = roster.enrol(token, new_key(), flower_key)
    with pytest.raises(InvitationError, match="used already, by another key"):
        roster.enrol(token, new_key(), flower_key)
    with pytest.raises(InvitationError, match="another Flower key"):
        roster.enrol(token, first.key, new_flower_key())
    assert roster.participants() == [first]


def test_a_new_invitation_replaces_an_open_one(roster: Roster) -> None:
    old = roster.invite("a", DAY)
    new = roster.invite("a", DAY)
    with pytest.raises(InvitationError, match="replaced"):
        roster.enrol(old, new_key(), new_flower_key())
    assert roster.enrol(new, new_key(), new_flower_key()).name == "a"


def test_an_enrolment_by_the_wrong_person_can_be_done_over(roster: Roster) -> None:
    """The fingerprints did not match: the operator invites again, and the first key is nobody's."""
    wrong = enrolled(roster, "a")
    right = enrolled(roster, "a")
    assert roster.by_key(wrong.key) is None
    assert roster.participants() == [right]


def test_a_key_takes_part_once(roster: Roster) -> None:
    first = enrolled(roster, "a")
    token = roster.invite("b", DAY)
    for key, flower_key in [(first.key, new_flower_key()), (new_key(), first.flower_key)]:
        with pytest.raises(InvitationError, match="in use"):
            roster.enrol(token, key, flower_key)
    assert roster.enrol(token, new_key(), new_flower_key()).name == "b"


@pytest.mark.parametrize("flower_key", ["", "x" * 10**6, new_flower_key(SECP256R1()), "\udc80"])
def test_flower_keys_of_another_kind(roster: Roster, flower_key: str) -> None:
    token = roster.invite("a", DAY)
    with pytest.raises(InvitationError, match="Flower key"):
        roster.enrol(token, new_key(), flower_key)


def test_a_flower_key_is_kept_in_its_one_form(roster: Roster) -> None:
    flower_key = new_flower_key()
    written = "comment\n" + flower_key.replace("\n", "\r\n")
    assert roster.enrol(roster.invite("a", DAY), new_key(), written).flower_key == flower_key


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_another_size(roster: Roster, size: int) -> None:
    token = roster.invite("a", DAY)
    with pytest.raises(InvitationError, match="32 bytes"):
        roster.enrol(token, bytes(size), new_flower_key())
    with pytest.raises(RosterError, match="32 bytes"):
        roster.rotate(approved(roster, "b").key, bytes(size))


def test_names_are_compared_in_their_normal_form(roster: Roster) -> None:
    token = roster.invite("Su\u0308d", DAY)
    assert roster.enrol(token, new_key(), new_flower_key()).name == "Süd"
    assert roster.approve("Su\u0308d", 1) == roster.by_name("Süd") == roster.by_name("Su\u0308d")
    with pytest.raises(InvitationError):
        roster.invite("../x", DAY)


# --- standing ----------------------------------------------------------------------------------


def test_suspended_resumed_revoked(roster: Roster) -> None:
    key = approved(roster, "a").key
    for decide, status in [
        (roster.suspend, "suspended"),
        (roster.resume, "approved"),
        (roster.suspend, "suspended"),
        (roster.revoke, "revoked"),
    ]:
        assert decide("a") == decide("a") == roster.by_key(key)  # twice is harmless
        assert roster.participants()[0].status == status
    kinds = [note.kind for note in roster.notes(3)]
    assert kinds == ["suspended", "resumed", "suspended", "revoked"]


def at(roster: Roster, status: Status) -> None:
    """A participant "a" in a given standing."""
    roster.invite("a", DAY)
    if status != "invited":
        enrolled(roster, "a")
    if status in ("approved", "suspended", "revoked"):
        roster.approve("a", 7)
    if status == "suspended":
        roster.suspend("a")
    if status == "revoked":
        roster.revoke("a")


@pytest.mark.parametrize(
    ("status", "decide"),
    [
        ("invited", lambda roster: roster.approve("a", 1)),
        ("approved", lambda roster: roster.approve("a", 1)),
        ("suspended", lambda roster: roster.approve("a", 7)),
        ("revoked", lambda roster: roster.approve("a", 7)),
        ("invited", lambda roster: roster.suspend("a")),
        ("pending", lambda roster: roster.suspend("a")),
        ("revoked", lambda roster: roster.suspend("a")),
        ("pending", lambda roster: roster.resume("a")),
        ("revoked", lambda roster: roster.resume("a")),
        ("approved", lambda roster: roster.invite("a", DAY)),
        ("suspended", lambda roster: roster.invite("a", DAY)),
    ],
)
def test_decisions_that_do_not_fit(
    roster: Roster, status: Status, decide: Callable[[Roster], object]
) -> None:
    at(roster, status)
    before, notes = roster.participants(), roster.notes()
    with pytest.raises(RosterError, match=f"a is .*{status}"):
        decide(roster)
    assert (roster.participants(), roster.notes()) == (before, notes)


@pytest.mark.parametrize("node_id", [0, -1, 2**64, 7])
def test_nodes_that_cannot_be(roster: Roster, node_id: int) -> None:
    approved(roster, "b", 7)
    enrolled(roster, "a")
    with pytest.raises(RosterError, match="node"):
        roster.approve("a", node_id)


def test_decisions_about_nobody(roster: Roster) -> None:
    for decide in (roster.suspend, roster.resume, roster.revoke):
        with pytest.raises(RosterError, match="no participant 'x'"):
            decide("x")
    with pytest.raises(RosterError, match="no participant"):
        roster.approve("x", 1)
    assert roster.by_name("x") is None and roster.by_key(new_key()) is None


def test_a_revoked_key_never_comes_back(roster: Roster) -> None:
    """Not even under another name, nor after the name was given to a new key."""
    lost = approved(roster, "a")
    roster.revoke("a")
    for name in ("b", "a"):
        with pytest.raises(InvitationError, match="in use under another name, or was"):
            roster.enrol(roster.invite(name, DAY), lost.key, new_flower_key())
    again = approved(roster, "a", 2)
    assert again.key != lost.key and roster.by_key(lost.key) is None


def test_a_revoked_invitation_is_void(roster: Roster) -> None:
    token = roster.invite("a", DAY)
    roster.revoke("a")
    with pytest.raises(InvitationError, match="revoked"):
        roster.enrol(token, new_key(), new_flower_key())


# --- keys --------------------------------------------------------------------------------------


def test_a_key_is_replaced_and_everything_else_stays(roster: Roster, clock: Clock) -> None:
    before = approved(roster, "a", 5)
    roster.certified(before.key, clock.now + 30 * DAY)
    roster.note("refusal", before.key, "too many steps")
    new = new_key()
    after = roster.rotate(before.key, new)
    assert roster.by_key(before.key) is None
    assert roster.by_key(new) == after
    assert (after.name, after.flower_key, after.node_id) == ("a", before.flower_key, 5)
    assert (after.status, after.certificate_expires) == ("approved", 0)
    history = [(note.kind, note.key) for note in roster.notes() if note.name == "a"]
    assert history[-2:] == [("refusal", before.key), ("rotated", new)]
    assert before.fingerprint in roster.notes()[-1].text


def test_a_rotation_whose_answer_was_lost_is_asked_for_again(roster: Roster) -> None:
    token, old, flower_key = roster.invite("a", DAY), new_key(), new_flower_key()
    roster.enrol(token, old, flower_key)
    roster.approve("a", 1)
    new = new_key()
    first = roster.rotate(old, new)
    assert roster.rotate(old, new) == first == roster.enrol(token, new, flower_key)
    assert [note.kind for note in roster.notes()].count("rotated") == 1


def test_an_old_key_does_nothing_any_more(roster: Roster) -> None:
    token, old, flower_key = roster.invite("a", DAY), new_key(), new_flower_key()
    roster.enrol(token, old, flower_key)
    roster.approve("a", 1)
    new = new_key()
    roster.rotate(old, new)
    with pytest.raises(RosterError, match="no participant"):
        roster.rotate(old, new_key())
    with pytest.raises(RosterError, match="no participant"):
        roster.touch(old)
    with pytest.raises(InvitationError, match="another key"):
        roster.enrol(token, old, flower_key)
    with pytest.raises(RosterError, match="in use, or was"):
        roster.rotate(new, old)
    with pytest.raises(InvitationError, match="in use"):
        roster.enrol(roster.invite("b", DAY), old, new_flower_key())


def test_a_key_of_another_cannot_be_taken(roster: Roster) -> None:
    one, two = approved(roster, "a", 1), approved(roster, "b", 2)
    for mine, wanted in [(one.key, two.key), (one.key, one.key)]:
        with pytest.raises(RosterError, match="in use"):
            roster.rotate(mine, wanted)


@pytest.mark.parametrize("status", ["pending", "suspended", "revoked"])
def test_only_an_approved_participant_changes_its_key(roster: Roster, status: Status) -> None:
    at(roster, status)
    with pytest.raises(RosterError, match=status):
        roster.rotate(roster.participants()[0].key, new_key())


def test_when_somebody_was_heard_of_last(roster: Roster, clock: Clock) -> None:
    key = approved(roster, "a").key
    begun = clock.now
    for passed, seen in [(0.0, 0.0), (TOUCH_SECONDS - 1, 0.0), (TOUCH_SECONDS, TOUCH_SECONDS)]:
        clock.now = begun + passed
        roster.touch(key)
        assert roster.participants()[0].seen == begun + seen
    clock.now = begun - DAY  # a clock that was set right
    roster.touch(key)
    assert roster.participants()[0].seen == begun - DAY


# --- several processes and threads -------------------------------------------------------------


def test_a_decision_holds_for_others_at_once(roster: Roster, tmp_path: Path) -> None:
    key = approved(roster, "a").key
    with Roster.open(tmp_path / "home" / "roster.db") as other:
        for decide, status in ((other.suspend, "suspended"), (other.revoke, "revoked")):
            decide("a")
            found = roster.by_key(key)
            assert found is not None and found.status == status


RACER = """
import sys
from pathlib import Path
from meadow.errors import InvitationError
from meadow.server.roster import Roster

path, token, key, flower_key = Path(sys.argv[1]), *sys.argv[2:]
with Roster.open(path) as roster:
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    try:
        roster.enrol(bytes.fromhex(token), bytes.fromhex(key), flower_key)
    except InvitationError as error:
        assert "by another key" in str(error)
        sys.exit(3)
"""


def test_of_two_processes_that_race_for_a_token_one_enrols(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    with Roster.open(path) as roster:
        token = roster.invite("a", DAY).hex()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, path, token, new_key().hex(), new_flower_key()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
    assert sorted(racer.returncode for racer in racers) == [0, 3]
    with Roster.open(path) as roster:
        assert [note.kind for note in roster.notes()] == ["invited", "enrolled"]


def test_threads_that_open_and_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "roster.db"
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Roster.open(path) as opened:
                for _ in range(5):
                    opened.note("refusal", b"", str(number))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with Roster.open(path) as opened:
        assert [note.id for note in opened.notes()] == list(range(1, 21))


def test_threads_share_one_roster(roster: Roster) -> None:
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(roster.note("x", b"", ""))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(roster.notes()) == 8


# --- damage ------------------------------------------------------------------------------------


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    Roster.open(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(FormatError, match="roster format 2, this meadow reads 1"):
        Roster.open(path)


def test_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(JournalError, match="damaged"):
        Roster.open(path)


# --- everything at once ------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b"])
KEYS = [new_key() for _ in range(5)]
FLOWER_KEYS = [new_flower_key() for _ in range(5)]
PLACES = st.integers(0, 4)


class Model(RuleBasedStateMachine):
    """Whatever is done in whatever order: keys never return, names never fork."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.roster = Roster.open(Path(":memory:"), MemoryDisk(), self.clock)
        self.tokens = [bytes(16)]
        self.dead: set[bytes] = set()

    def teardown(self) -> None:
        self.roster.close()

    def attempt(self, decide: Callable[[], object]) -> None:
        try:
            decide()
        except MeadowError:
            pass

    @rule(name=NAMES)
    def invite(self, name: str) -> None:
        self.attempt(lambda: self.tokens.append(self.roster.invite(name, DAY)))

    @rule(token=st.integers(0, 9), key=PLACES)
    def enrol(self, token: int, key: int) -> None:
        chosen = self.tokens[-1 - token % len(self.tokens)]
        self.attempt(lambda: self.roster.enrol(chosen, KEYS[key], FLOWER_KEYS[key]))

    @rule(name=NAMES, node=st.integers(1, 3))
    def approve(self, name: str, node: int) -> None:
        self.attempt(lambda: self.roster.approve(name, node))

    @rule(name=NAMES, what=st.sampled_from(["suspend", "resume"]))
    def decide(self, name: str, what: str) -> None:
        self.attempt(lambda: getattr(self.roster, what)(name))

    @rule(name=NAMES)
    def revoke(self, name: str) -> None:
        known = self.roster.by_name(name)
        self.attempt(lambda: self.roster.revoke(name))
        if known is not None and known.key:
            self.dead.add(known.key)

    @rule(old=PLACES, new=PLACES)
    def rotate(self, old: int, new: int) -> None:
        known = self.roster.by_key(KEYS[old])
        self.attempt(lambda: self.roster.rotate(KEYS[old], KEYS[new]))
        if known is not None and self.roster.by_key(KEYS[old]) is None:
            self.dead.add(KEYS[old])

    @rule(passed=st.sampled_from([1.0, DAY, -DAY]))
    def wait(self, passed: float) -> None:
        self.clock.now += passed

    @invariant()
    def dead_keys_are_of_no_use(self) -> None:
        for key in self.dead:
            found = self.roster.by_key(key)
            assert found is None or found.status == "revoked"

    @invariant()
    def nobody_is_half_enrolled(self) -> None:
        people = self.roster.participants()
        for one in people:
            assert bool(one.key) == bool(one.flower_key) == bool(one.enrolled)
            assert one.status in ("invited", "revoked") or one.key
            assert bool(one.node_id) >= (one.status in ("approved", "suspended"))
        keys = [one.key for one in people if one.key]
        assert len(set(keys)) == len(keys)

    @invariant()
    def the_notes_hold(self) -> None:
        self.roster.notes()


class MemoryDisk(Disk):
    """No files at all, for many short lives."""

    def folder(self, path: Path) -> None:
        return

    def connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None)


def test_whatever_is_done_in_whatever_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the lock beside ":memory:" is a file all the same
    run_state_machine_as_test(
        Model, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
