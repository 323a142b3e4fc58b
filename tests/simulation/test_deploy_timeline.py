"""The arithmetic of a round's seconds and bytes, over traces that are written by hand."""

from __future__ import annotations

import pytest
from deployed_traces import FLEET, PERIOD, SPANS, traces

from meadow.errors import DeploymentError
from meadow.simulation.deploy_timeline import Traces, mean_seconds


def test_the_causes_are_the_whole_round() -> None:
    found = traces().moments(2).seconds
    assert found == pytest.approx(SPANS)
    assert sum(found.values()) == pytest.approx(PERIOD)
    assert mean_seconds([found, {cause: 3 * s for cause, s in found.items()}]) == pytest.approx(
        {cause: 2 * s for cause, s in SPANS.items()}
    )


def test_first_and_last_round_are_left_out() -> None:
    assert list(traces(5).rounds()) == [2, 3, 4]


def test_bytes_are_those_between_two_openings() -> None:
    assert traces().bytes(2) == (10 + 10 + 10 + 10 + 10 + 60 + 710, 50 + 910 + 20)
    assert traces().sizes(3) == (700, 900)


def test_an_answer_without_large_parts_is_sent_with_its_description() -> None:
    whole = traces()
    traffic = [row for row in whole.traffic if row["path"] != FLEET + "push-object"]
    found = Traces(whole.events, traffic, whole.requests).moments(2).seconds
    assert found["transfer_up"] == 0.0 and sum(found.values()) == pytest.approx(PERIOD)


@pytest.mark.parametrize(
    ("part", "said"), [("events", "round_opened"), ("traffic", "pull-messages"), ("requests", "re")]
)
def test_what_is_missing_is_named(part: str, said: str) -> None:
    whole = vars(traces()) | {part: []}
    with pytest.raises(DeploymentError, match=f"the run's traces name no .*{said}"):
        Traces(**whole).moments(2)
