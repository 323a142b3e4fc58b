"""The roster: who may become what, by which key, and what is written down of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from enrolment import DAY, Clock, approved, enrolled, new_flower_key, new_key

from meadow.errors import InvitationError, RosterError
from meadow.server.participant import Status
from meadow.server.roster import TOUCH_SECONDS, Participant, Roster


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
