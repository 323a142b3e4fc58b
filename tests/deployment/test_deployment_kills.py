"""kill -9 of every process of a deployment, at points all through a round.

The rounds go on, each participant's contribution counts once in each, and the adapter is the one
of a run in which nothing failed.  DiLoCo in 16 bits, so that participants have most to remember:
their optimisers' state and what rounding has kept back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from deployments import PEOPLE, Deployment, small_config
from round_points import answering, answering_and_training, closing, sent, training

pytestmark = pytest.mark.long(minutes=6)

EMAIL, HTTP = PEOPLE

Point = Callable[[Deployment, int], AbstractContextManager[None]]
Kill = Callable[[Deployment], None]


# Kills


def service(name: str) -> Kill:
    return lambda deployment: deployment.kill(deployment.service(name))


def part(name: str, who: str = EMAIL) -> Kill:
    return lambda deployment: deployment.kill(deployment.part(who, name))


def both_ends_of_the_wire(deployment: Deployment) -> None:
    service("gateway")(deployment)
    part("forwarder")(deployment)


def daemon(deployment: Deployment) -> None:
    """The participant's supervisor, which the system starts again."""
    deployment.kill_command(deployment.daemons[EMAIL])
    deployment.daemons[EMAIL].start()


def supervisor(deployment: Deployment) -> None:
    """The coordinator's, which its operator starts again with the same command."""
    deployment.kill_command(deployment.coordinator)
    deployment.coordinator.start()


def supernode_here_client_process_there(deployment: Deployment) -> None:
    """Flower takes up to a minute to miss either; they are missed together."""
    part("supernode", EMAIL)(deployment)
    part("client process", HTTP)(deployment)


FAULTS: tuple[tuple[str, Point, Kill], ...] = (
    ("gateway, message sent", sent, service("gateway")),
    ("superlink, training", training, service("superlink")),
    ("gateway and forwarder, answer on its way", answering, both_ends_of_the_wire),
    ("superexec, closing", closing, service("superexec")),
    ("server app, training", training, service("server app")),
    ("trainer, training", training, part("trainer")),
    ("supernode, client process", answering_and_training, supernode_here_client_process_there),
    ("daemon, training", training, daemon),
    ("supervisor, answer on its way", answering, supervisor),
)
ROUNDS = 1 + len(FAULTS)
"""The first is everybody's beginning."""


def test_whatever_is_killed_every_contribution_counts_once(short_path: Path) -> None:
    config = small_config(ROUNDS).replace(strategy={"name": "diloco"}, clients={"wire": "bfloat16"})
    with Deployment(short_path / "d", config) as deployment:
        deployment.start()
        for number, (title, point, kill) in enumerate(FAULTS, 2):
            deployment.at = f"round {number}: kill -9 of {title}"
            with point(deployment, number):
                kill(deployment)
            deployment.end(number)
        deployment.at = "the end"
        deployment.finish()
    assert deployment.left_behind() == []
    once = dict.fromkeys(PEOPLE, 1)
    assert deployment.counted() == dict.fromkeys(range(1, ROUNDS + 1), once)
    found, expected = deployment.adapter(), deployment.local_adapter()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
