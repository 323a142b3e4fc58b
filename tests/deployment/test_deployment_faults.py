"""Faults of networks, disks, files and people in one deployment of two participants.

Whoever cannot or may not contribute is named, and the run goes on with the other; whoever comes
back counts again, and once.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deployments import PEOPLE, CommandFailed, Deployment, small_config
from round_points import answering, training
from safetensors.torch import load_file, save_file
from tcp_proxy import TcpProxy

from meadow.client import gateway_client
from meadow.client.flower_key import FlowerKey
from meadow.client.gateway_client import GatewayClient
from meadow.client.home import FLOWER_KEY, TERMS
from meadow.client.membership import Membership
from meadow.errors import GatewayError
from meadow.identity import Identity
from meadow.invitation import Invitation
from meadow.nano import FOLDER as NANO
from meadow.processes import free_port
from meadow.server.roster import Roster
from meadow.store import Disk

pytestmark = [
    pytest.mark.long(minutes=6),
    pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files"),
]

EMAIL, HTTP = PEOPLE


def test_a_run_outlives_what_happens_to_its_participants(short_path: Path) -> None:
    with (
        Deployment(short_path / "d", small_config(ROUNDS)) as deployment,
        TcpProxy(deployment.port) as wire,
    ):
        deployment.reach_at(listen=deployment.port, address=wire.port)
        deployment.start_coordinator()
        words = deployment.invitations()
        for refusal in (expired, of_another_version, over_another_base):
            deployment.at = refusal.__name__
            refusal(deployment, words[EMAIL])
        for name, word in words.items():
            deployment.join(name, word)
        for refusal in (used_by_another, agreed_with_another_version):
            deployment.at = refusal.__name__
            refusal(deployment, words[EMAIL])
        deployment.tell_address(HTTP, deployment.port)  # the wire is EMAIL's alone
        deployment.at = "round 1"
        deployment.train()
        for number, fault in enumerate(FAULTS, 2):
            deployment.at = f"round {number}: {fault.__name__}"
            fault(deployment, number, wire)
            deployment.end(number)
        deployment.at = "the end"
        deployment.finish()
    assert deployment.left_behind() == []
    expected = {n: dict.fromkeys(ALONE.get(n, PEOPLE), 1) for n in range(1, ROUNDS + 1)}
    assert deployment.counted() == expected


# At the door


def expired(deployment: Deployment, word: str) -> None:
    with Roster.open(deployment.home.roster) as roster:
        token = roster.invite("late", 1e-6)
    late = dataclasses.replace(Invitation.parse(word), name="late", token=token).text()
    deployment.somebody("late")
    said = refusal_of(lambda: deployment.join("late", late))
    assert "this invitation has expired" in said


def of_another_version(deployment: Deployment, word: str) -> None:
    """A client of another minor version is told so before its invitation is used up."""
    folder = deployment.somebody("old")
    identity = Identity.load_or_create(folder / "identity.pem", Disk())
    key = FlowerKey.load_or_create(folder / FLOWER_KEY, Disk()).public_pem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway_client, "__version__", "9.9.0")
        membership = Membership.of(Invitation.parse(word))
        with GatewayClient(membership, identity) as gateway, pytest.raises(GatewayError) as told:
            gateway.enrol(key)
    assert told.value.status == 409 and "'9.9.0'" in str(told.value)


def over_another_base(deployment: Deployment, word: str) -> None:
    """One weight is enough.  The same command with the right base goes on afterwards."""
    base = deployment.stage.out / "base"
    shutil.copytree(NANO, base)
    weights = load_file(base / "model.safetensors")
    first = min(weights)
    weights[first].view(-1)[0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = refusal_of(lambda: deployment.join(EMAIL, word, "--base", str(base)))
    assert "is another than the run's" in said


def used_by_another(deployment: Deployment, word: str) -> None:
    deployment.somebody("thief")
    said = refusal_of(lambda: deployment.join("thief", word))
    assert "this invitation was used already, by another key" in said


def agreed_with_another_version(deployment: Deployment, word: str) -> None:
    """A daemon whose meadow was exchanged since its participant agreed does not start."""
    terms = deployment.folder(EMAIL) / TERMS
    agreed = terms.read_text()
    terms.write_text(json.dumps(json.loads(agreed) | {"meadow": "9.9.0"}))
    said = refusal_of(lambda: deployment.client(EMAIL, "run"))
    assert "the run is of meadow '9.9.0'" in said
    terms.write_text(agreed)


# Network


def network_lost(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """It goes while an answer is on its way, and comes back."""
    with answering(deployment, number):
        wire.cut = True
        wire.hang_up()
    log = deployment.folder(EMAIL) / "logs" / "forwarder.log"
    deployment.wait("word of it", lambda: "push-messages: the coordinator's" in log.read_text())
    wire.cut = False


def slow_link(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    wire.bytes_per_second = 100_000
    deployment.begin(number)
    for name in PEOPLE:
        deployment.wait(
            f"{name}'s contribution",
            lambda: deployment.contributed(name, number),  # noqa: B023
        )
    wire.bytes_per_second = 0


def receipt_lost(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """An answer is announced, whose receipt gets lost: it is announced again, and counts once."""
    node = Membership.load(deployment.folder(EMAIL)).node_id

    def announced() -> int:
        log = (deployment.home.logs / "superlink.log").read_text(errors="replace")
        return log.count(f"Push replies from node_id={node}")

    with answering(deployment, number):
        before, wire.deaf = announced(), True
    deployment.wait("answer at the SuperLink", lambda: announced() > before)
    heard = wire.swallowed
    deployment.wait("receipt that nobody hears", lambda: wire.swallowed > heard)
    wire.deaf = False
    wire.hang_up()
    deployment.end(number)
    assert announced() == before + 2, "the answer once, and what was then measured"


def moved(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """The coordinator stops, and goes on at an address that participants are told."""
    port = free_port()
    with answering(deployment, number):
        deployment.coordinator.stop()
        deployment.reach_at(listen=port, address=port)
        deployment.start_coordinator()
        for name in PEOPLE:
            deployment.tell_address(name, port)


# Text and disks


def text_changed(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    text = deployment.stage.out / EMAIL / "rows.jsonl"
    with kept(text):
        row = json.dumps({"prompt": "one", "response": "more"})
        text.write_text(f"{text.read_text()}{row}\n")
        reason = refusal_in(deployment, number, EMAIL)
        assert "text has changed since the run began" in reason
        outcomes = [row["outcome"] for row in status_of(deployment, EMAIL)["recent"]]
        assert any(reason in outcome for outcome in outcomes)


def text_malformed(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """The coordinator is told less than its participant."""
    text = deployment.stage.out / EMAIL / "rows.jsonl"
    with kept(text):
        text.write_text('{"prompt": "never closed\n')
        reason = refusal_in(deployment, number, EMAIL)
        assert reason == "the participant's text cannot be used"
        assert "rows.jsonl" in status_of(deployment, EMAIL)["fault"]


def participants_disk_full(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    with no_room_for(deployment.part(EMAIL, "trainer")):
        reason = refusal_in(deployment, number, EMAIL)
    assert reason == "the participant's disk cannot be used"
    assert "the chain holds" in deployment.client(EMAIL, "log")


def coordinators_disk_full(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """What had arrived stays, what had not comes again once there is room."""
    with training(deployment, number):
        full = deployment.service("server app")
        resource.prlimit(full, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    deployment.wait("other server app", lambda: deployment.service("server app") != full)


# People


def suspended(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    log = deployment.folder(HTTP) / "logs" / "forwarder.log"
    with training(deployment, number, HTTP):
        deployment.operator("suspend", HTTP)
        assert "does not take part" in refusal_event(deployment, number, HTTP)
        deployment.wait("word of it", lambda: "suspended" in log.read_text())
        deployment.operator("readmit", HTTP)


def readmitted(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    deployment.begin(number)


def vanished(deployment: Deployment, number: int, wire: TcpProxy) -> None:
    """A machine is gone for good, and the operator does not wait for the deadline."""
    with training(deployment, number, HTTP):
        deployment.kill_command(deployment.daemons[HTTP])
        for name in ("forwarder", "trainer", "supernode"):
            deployment.kill_part(HTTP, name)
    deployment.operator("revoke", HTTP)
    assert "does not take part" in refusal_event(deployment, number, HTTP)


FAULTS = (
    network_lost,
    slow_link,
    receipt_lost,
    moved,
    text_changed,
    text_malformed,
    participants_disk_full,
    coordinators_disk_full,
    suspended,
    readmitted,
    vanished,
)
ROUNDS = 1 + len(FAULTS)
"""The first is everybody's beginning."""
ALONE = {
    2 + FAULTS.index(fault): (who,)
    for fault, who in (
        (text_changed, HTTP),
        (text_malformed, HTTP),
        (participants_disk_full, HTTP),
        (suspended, EMAIL),
        (vanished, EMAIL),
    )
}
"""Rounds to which one participant contributes alone."""


# What they have in common


def refusal_of(command: Callable[[], object]) -> str:
    """What a command says that is refused as a user's mistake: with status 2."""
    with pytest.raises(CommandFailed) as failed:
        command()
    assert failed.value.code == 2, failed.value
    return " ".join(failed.value.said.split())


def refusal_in(deployment: Deployment, number: int, who: str) -> str:
    """Why somebody does not contribute to a round, which is begun."""
    deployment.begin(number)
    return refusal_event(deployment, number, who)


def status_of(deployment: Deployment, who: str) -> dict[str, Any]:
    """What a participant is told by `meadow client status`."""
    deployment.client(who, "status", "--json", "status.json")
    found: dict[str, Any] = json.loads((deployment.stage.out / who / "status.json").read_text())
    return found


def refusal_event(deployment: Deployment, number: int, who: str) -> str:
    found: list[str] = []

    def refused() -> bool:
        rows = deployment.events("refused", number)
        found[:] = [row["reason"] for row in rows if row["client"] == who]
        return bool(found)

    deployment.wait(f"refusal of {who}", refused)
    return found[0]


@contextmanager
def kept(file: Path) -> Iterator[None]:
    """Put a file's content back afterwards."""
    content = file.read_bytes()
    yield
    file.write_bytes(content)


@contextmanager
def no_room_for(pid: int) -> Iterator[None]:
    """No file of a process may grow: what a full disk is to it."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
