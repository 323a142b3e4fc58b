"""Flower's private identities, quarantined: outside a Flower process no `Message` can be made
without a task's, nor told apart without its own.  The only place that touches a private name."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity


def assume(run_id: int = 1, node_id: int = 1, task_id: int = 1) -> None:
    """Give this process the identity that Flower's own executor would have given it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id


def name_message(metadata: object, message_id: str) -> None:
    """Give a message, by its metadata, the id that Flower's SuperLink would have given it."""
    metadata.__dict__["_message_id"] = message_id
