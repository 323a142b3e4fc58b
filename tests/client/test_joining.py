"""Joining and leaving: one membership a folder, keys that stay here, and a crash at every step."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import Crash, Faulty, Numbered
from gateways import Site, site
from homes import terms_json

from meadow.client.flower_key import FlowerKey
from meadow.client.gateway_client import Enrolment, GatewayClient
from meadow.client.home import FLOWER_KEY, LOCK, MEMBERSHIP, OUTGOING, POLICY, TERMS, terms_in
from meadow.client.joining import (
    admit,
    approve,
    begun,
    enrol,
    folder_of,
    leave,
    make_folder,
    memberships,
    only_membership,
    own_fingerprint,
    require_folder,
    rules_of,
)
from meadow.client.membership import Membership
from meadow.client.policy import Policy
from meadow.config import Config
from meadow.errors import (
    ConfigError,
    DataError,
    GatewayError,
    IdentityError,
    JournalError,
    StorageError,
)
from meadow.identity import HOME, own_identity
from meadow.invitation import Invitation
from meadow.server.roster import Participant, Roster
from meadow.store import Disk, locked
from meadow.terms import Terms

INVITATION = Invitation("ada", ("127.0.0.1:9440",), b"", bytes(16), 2**40)


@pytest.fixture
def user(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has joined nothing yet."""
    monkeypatch.setenv(HOME, str(short_path / "home"))
    return short_path / "home"


def joined(name: str) -> Path:
    folder = folder_of(name)
    make_folder(folder, Disk())
    dataclasses.replace(Membership.of(INVITATION), name=name).save(folder, Disk())
    return folder


# --- folders -------------------------------------------------------------------------------------


def test_the_one_membership_is_found_and_several_have_to_be_named(user: Path) -> None:
    with pytest.raises(ConfigError, match="has joined no run"):
        only_membership()
    folder = joined("ada")
    assert only_membership() == folder and folder.stat().st_mode & 0o777 == 0o700
    other = joined("Söhne")
    assert memberships() == sorted([folder, other])
    with pytest.raises(ConfigError, match="has joined 2 runs .*--folder"):
        only_membership()


@pytest.mark.parametrize("name", ["a.b", "a b", "名" * 21, "%2e%2e", "a" * 64])
def test_every_name_has_a_folder_of_its_own_below_the_users(user: Path, name: str) -> None:
    folder = folder_of(name)
    assert folder.parent == user / "clients" and len(folder.name.encode()) < 60
    assert folder != folder_of(name + "x") and folder.resolve().parent == folder.parent


def test_a_folder_whose_socket_could_not_be_named_is_refused_before_it_is_made(
    tmp_path: Path,
) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with pytest.raises(ConfigError, match="has more than 107 bytes .*MEADOW_HOME"):
        make_folder(deep, Disk())
    assert not deep.exists()


def test_another_folder_is_no_participants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no participant's folder"):
        require_folder(tmp_path)


# --- enrolment -----------------------------------------------------------------------------------


def test_the_same_invitation_goes_on_and_another_is_refused(user: Path) -> None:
    folder = joined("ada")
    known = dataclasses.replace(Membership.load(folder), certificate="kept", terms="ab")
    known.save(folder, Disk())
    moved = dataclasses.replace(INVITATION, addresses=("example.org:1",))
    assert begun(folder, moved) == dataclasses.replace(known, addresses=("example.org:1",))
    with pytest.raises(ConfigError, match="is ada's already, by another invitation"):
        begun(folder, dataclasses.replace(INVITATION, token=bytes(15) + b"x"))
    assert begun(user / "elsewhere", INVITATION) == Membership.of(INVITATION)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "coordinator") as place:
        yield place


def test_enrolment_waits_until_the_operator_approves(place: Site, user: Path) -> None:
    invitation, identity = place.invite("ada"), own_identity()
    flower, told, asked = FlowerKey.load_or_create(user / FLOWER_KEY), [], []

    def sleep(seconds: float) -> None:
        """The second time the gateway is gone for a while; the third, the operator decides."""
        asked.append(seconds)
        if len(asked) == 2:
            place.stop()
        if len(asked) == 4:
            place.move(invitation.addresses[0])
            place.roster.approve("ada", 7)

    with GatewayClient(Membership.of(invitation), identity) as gateway:
        found = enrol(gateway, identity, flower.public_pem, lambda: told.append(1), sleep)
        assert (found.name, found.node_id, len(told), len(asked)) == ("ada", "7", 1, 4)
        again = enrol(gateway, identity, flower.public_pem, lambda: told.append(1), sleep)
    assert again.certificate and len(told) == 1
    assert found.fingerprint == own_fingerprint(identity)
    place.roster.suspend("ada")
    with GatewayClient(Membership.of(invitation), identity) as gateway:
        with pytest.raises(GatewayError, match="ada is suspended"):
            enrol(gateway, identity, flower.public_pem, lambda: None, sleep)


def test_a_gateway_that_cannot_answer_for_a_while_does_not_end_the_wait(
    place: Site, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its roster is locked, or its disk full; but a decision against the participant is an end."""
    invitation, identity = place.invite("ada"), own_identity()
    flower, asked = FlowerKey.load_or_create(user / FLOWER_KEY).public_pem, []
    real, unwell = Roster.enrol, threading.Event()

    def enrolled(roster: Roster, token: bytes, key: bytes, flower_key: str) -> Participant:
        if unwell.is_set():
            raise StorageError("cannot write roster.db: the disk is full")
        return real(roster, token, key, flower_key)

    def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 1:
            unwell.set()
        if len(asked) == 3:
            unwell.clear()
            place.roster.revoke("ada")

    monkeypatch.setattr(Roster, "enrol", enrolled)

    with GatewayClient(Membership.of(invitation), identity) as gateway:
        with pytest.raises(GatewayError, match="revoked") as caught:
            enrol(gateway, identity, flower, lambda: None, sleep)
        unwell.set()
        with pytest.raises(GatewayError, match="the disk is full"):  # nothing to wait for yet
            enrol(gateway, identity, flower, lambda: None, sleep)
    assert len(asked) == 3 and caught.value.status == 403


def test_what_is_given_to_who_enrolled_is_added_to_what_is_there(user: Path) -> None:
    folder, begins = joined("ada"), Membership.of(INVITATION)
    found = Enrolment("ada", "", "approved", "a certificate", node_id="7")
    Membership.change(folder, Disk(), lambda now: dataclasses.replace(now, terms="ab"))
    for place in (folder, user):  # the latter has no membership yet
        admit(place, begins, found, Disk())
        now = Membership.load(place)
        assert (now.certificate, now.node_id, now.token) == ("a certificate", "7", begins.token)
        assert now.terms == ("ab" if place == folder else "")


def test_a_gateway_that_put_down_another_key_is_found_out(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read out over the telephone is this machine's key, whatever the gateway says."""
    swapped = Enrolment("ada", "0000 1111", "pending")
    monkeypatch.setattr(GatewayClient, "enrol", lambda self, key: swapped)
    with GatewayClient(Membership.of(INVITATION), own_identity()) as gateway:
        with pytest.raises(IdentityError, match="another key under this invitation"):
            enrol(gateway, own_identity(), "key", lambda: None)


# --- rules ---------------------------------------------------------------------------------------


def test_text_and_base_are_noted_as_they_lie_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "base").mkdir()
    rules = rules_of(tmp_path, ["rows.jsonl", "*.jsonl", "datasets:some/name", "nano"], "base")
    here = str(tmp_path)
    assert rules.data == [f"{here}/rows.jsonl", f"{here}/*.jsonl", "datasets:some/name", "nano"]
    assert rules.base == f"{here}/base"
    assert rules_of(tmp_path, ["nano"], "some/hub-name").base == "some/hub-name"


def test_rules_that_are_there_are_kept_where_nothing_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    data = [str(tmp_path / "rows.jsonl")]
    mine = Policy(data=data, base="mine", most_steps=7)
    mine.save(tmp_path / POLICY, Disk())
    assert rules_of(tmp_path, [], "") == mine
    assert rules_of(tmp_path, ["nano"], "other") == dataclasses.replace(
        mine, data=["nano"], base="other"
    )


@pytest.mark.parametrize("source", ["nothing.jsonl", "*.jsonl", "empty"])
def test_text_that_is_not_there_is_said_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no text at .*--data takes"):
        rules_of(tmp_path, [source], "")


def test_agreeing_is_finished_by_the_same_command_wherever_it_was_cut_short(
    tiny: Config, tmp_path: Path
) -> None:
    """And in no state between does the policy accept terms that were not agreed to."""
    text = terms_json(tiny)
    terms = Terms.parse(text)
    disk = Numbered(tmp_path / "whole")
    _agreed(tmp_path / "whole", terms, text, disk)
    for at in range(1, disk.count + 1):
        root = tmp_path / str(at)
        with pytest.raises(Crash):
            _agreed(root, terms, text, Faulty(root, at, "before"))
        if (root / TERMS).exists():
            Policy.load(root / POLICY).check_terms(terms_in(root))
        approve(root, terms, text, Policy(data=["nano"]), Disk())
        assert Membership.load(root).terms == terms_in(root).digest == terms.digest
        shutil.rmtree(root)
        shutil.rmtree(root.with_name(f"{at}+"), ignore_errors=True)


def _agreed(root: Path, terms: Terms, text: bytes, disk: Disk) -> None:
    root.mkdir()
    Membership.of(INVITATION).save(root, Disk())
    approve(root, terms, text, Policy(data=["nano"]), disk)


# --- leaving -------------------------------------------------------------------------------------


def filled(folder: Path) -> Path:
    make_folder(folder, Disk())
    Membership.of(INVITATION).save(folder, Disk())
    for name in (FLOWER_KEY, POLICY, TERMS, OUTGOING, f"{OUTGOING}.head", "trainer.sock"):
        (folder / name).write_text("x")
    (folder / "outbox" / "ab").mkdir(parents=True)
    (folder / "outbox" / "ab" / "1.record").write_text("x")
    return folder


def test_leaving_keeps_the_log_of_what_was_sent_and_nothing_else(tmp_path: Path) -> None:
    folder = filled(tmp_path / "ada")
    beside = tmp_path / "rows"
    beside.mkdir()
    (folder / "link").symlink_to(beside)
    leave(folder)
    assert sorted(path.name for path in folder.iterdir()) == [OUTGOING, f"{OUTGOING}.head"]
    assert beside.is_dir()


def test_nobody_leaves_while_the_daemon_runs(tmp_path: Path) -> None:
    folder = filled(tmp_path / "ada")
    with locked(folder / LOCK, ""), pytest.raises(JournalError, match="stop its daemon first"):
        leave(folder)
    assert (folder / MEMBERSHIP).exists() and (folder / FLOWER_KEY).exists()


def test_leaving_that_was_cut_short_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = filled(tmp_path / "ada"), Path.unlink
    for allowed in range(20):
        left = [allowed]

        def unlink(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            real(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink)
        try:
            leave(folder)
        except Crash:
            assert allowed > 4 or (folder / MEMBERSHIP).exists()
        else:
            break
    assert sorted(path.name for path in folder.iterdir()) == [OUTGOING, f"{OUTGOING}.head"]
