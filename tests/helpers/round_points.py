"""Points of a round at which a deployment is kept still, whatever the speed of the machine.

Each opens the round; `who` is the participant that stops there, the other goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deployments import PEOPLE, Deployment

EMAIL, HTTP = PEOPLE


@contextmanager
def sent(deployment: Deployment, number: int) -> Iterator[None]:
    """The round is open, and a participant's message still lies at the coordinator."""
    with deployment.held(deployment.part(EMAIL, "supernode")):
        deployment.begin(number)
        yield


@contextmanager
def training(deployment: Deployment, number: int, who: str = EMAIL) -> Iterator[None]:
    """One participant is at work; the other's contribution is in the journal."""
    other = HTTP if who == EMAIL else EMAIL
    with deployment.held(deployment.part(who, "trainer")):
        before = deployment.received(who)
        deployment.begin(number)
        deployment.wait("message at the participant", lambda: deployment.received(who) > before)
        deployment.wait("other's contribution", lambda: deployment.contributed(other, number))
        yield


@contextmanager
def answering(deployment: Deployment, number: int) -> Iterator[None]:
    """One participant's answer is made, logged and on its way to the coordinator."""
    trainer, forwarder = (deployment.part(EMAIL, name) for name in ("trainer", "forwarder"))
    before = deployment.received(EMAIL)
    with deployment.held(trainer):
        deployment.begin(number)
        deployment.wait("message at the participant", lambda: deployment.received(EMAIL) > before)
        with deployment.held(forwarder):
            deployment.release(trainer)
            deployment.wait("answer", lambda: deployment.has_trained(EMAIL, number))
            yield


@contextmanager
def answering_and_training(deployment: Deployment, number: int) -> Iterator[None]:
    """One participant's answer is on its way, the other is still at work."""
    with deployment.held(deployment.part(HTTP, "trainer")), answering(deployment, number):
        deployment.part(HTTP, "client process")
        yield


@contextmanager
def closing(deployment: Deployment, number: int) -> Iterator[None]:
    """All contributions are in; the new adapter is being measured, the round not yet closed."""
    deployment.begin(number)
    for name in PEOPLE:
        deployment.wait(f"{name}'s answer", lambda: deployment.has_trained(name, number))  # noqa: B023
    with deployment.held(deployment.part(EMAIL, "trainer")):
        for name in PEOPLE:
            deployment.wait(
                f"{name}'s contribution",
                lambda: deployment.contributed(name, number),  # noqa: B023
            )
        assert not deployment.events("round_closed", number)
        yield
