"""Traces of a deployed run, written by hand: rounds of equal length, every cause with its own."""

from __future__ import annotations

from typing import Any

from meadow.simulation.deploy_timeline import CAUSES, Traces

FLEET = "/v1/fleet/"
SPANS = dict(zip(CAUSES, (0.5, 0.25, 2.0, 1.0, 0.125, 0.0625, 0.25, 0.5), strict=True))
PERIOD = sum(SPANS.values())


def exchange(time: float, route: str, up: int = 10, down: int = 0) -> dict[str, Any]:
    return {"time": time, "path": FLEET + route, "status": 200, "up": up, "down": down}


def traces(rounds: int = 4) -> Traces:
    """`rounds` rounds of equal length; between them an idle question and a heartbeat."""
    events: list[dict[str, Any]] = []
    traffic: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        opened = 1000.0 + (number - 1) * PERIOD
        at, moment = {}, opened
        for cause, span in SPANS.items():
            at[cause] = moment = moment + span
        events += [
            {"kind": "round_opened", "round": number, "time": opened},
            {"kind": "contribution", "round": number, "time": at["collection"], "bytes": 700},
            {"kind": "round_closed", "round": number, "time": at["collection"], "bytes_down": 900},
        ]
        traffic += [
            exchange(opened + 0.01, "pull-messages"),
            exchange(at["delivery"], "pull-messages", 10, 50),
            exchange(at["transfer_down"] - 0.1, "pull-object", 10, 910),
            exchange(at["transfer_down"], "confirm-message-received"),
            exchange(at["client_process"], "send-node-heartbeat"),
            exchange(at["hand_over"], "push-messages", 60, 20),
            exchange(at["transfer_up"], "push-object", 710),
        ]
        request = {"verb": "train", "round": number, "since": at["client_process"]}
        requests.append({**request, "seconds": SPANS["work"], "loading_seconds": 0.0})
        requests.append({**request, "verb": "evaluate", "seconds": 9.0})
    return Traces(events, traffic, requests)
