"""Flower's private task identity, quarantined: outside a Flower process no `Message` can be made
without it.  The only place that touches a private name of Flower."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity


def assume(run_id: int = 1, node_id: int = 1, task_id: int = 1) -> None:
    """Give this process the identity that Flower's own executor would have given it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = task_id
