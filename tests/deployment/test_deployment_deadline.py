"""Who stalls costs a round its deadline and nothing more: the next round counts everybody again,
and a later one, for less, what came too late.

Real processes; one participant's answer trickles through its wire, so that the server app is in the
middle of fetching it when the deadline comes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deployments import PEOPLE, Deployment, small_config
from round_points import answering
from tcp_proxy import TcpProxy

pytestmark = pytest.mark.long(minutes=4)

EMAIL, HTTP = PEOPLE
ROUNDS = 5
SECONDS = 60.0
TRICKLE = 1000.0
"""Bytes a second, of an answer of 350,000."""


def test_an_answer_that_trickles_costs_the_deadline(short_path: Path) -> None:
    config = small_config(ROUNDS).replace(
        rounds={"deadline_seconds": SECONDS, "quorum": 0.5},
        strategy={"options": {"late": ROUNDS - 2}},
    )
    with Deployment(short_path / "d", config) as deployment, TcpProxy(deployment.port) as wire:
        deployment.reach_at(listen=deployment.port, address=wire.port)
        deployment.start_coordinator()
        for name, word in deployment.invitations().items():
            deployment.join(name, word)
        deployment.tell_address(HTTP, deployment.port)  # the wire is EMAIL's alone
        deployment.train()
        deployment.at = "round 2: an answer that trickles"
        with answering(deployment, 2):
            wire.bytes_per_second = TRICKLE
        deployment.end(2)
        (opened,), (closed,) = (deployment.events(f"round_{k}", 2) for k in ("opened", "closed"))
        assert closed["missing"] == [EMAIL] and closed["losses"].keys() == {HTTP}
        assert closed["time"] - opened["time"] >= SECONDS, "it was waited for"
        wire.bytes_per_second = 0
        for number in range(3, ROUNDS + 1):
            deployment.at = f"round {number}: everybody again"
            deployment.begin(number)
            deployment.end(number)
        deployment.finish()
    assert deployment.left_behind() == []
    (late,) = deployment.events("late")
    assert (late["client"], late["round"]) == (EMAIL, 2)
    (counted,) = [number for number, row in rows(deployment).items() if "late" in row]
    assert counted == late["counts_in"] > 2, "in the one after that in which its last byte came"
    assert rows(deployment)[counted]["late"] == [[2, EMAIL]]
    cohorts = dict.fromkeys(range(1, ROUNDS + 1), PEOPLE) | {2: (HTTP,)}
    assert deployment.counted() == {n: dict.fromkeys(who, 1) for n, who in cohorts.items()}


def rows(deployment: Deployment) -> dict[int, dict[str, Any]]:
    """What is told of each round's end."""
    return {row["round"]: row for row in deployment.events("round_closed")}
