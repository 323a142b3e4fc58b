"""The gates that read manifests: each rule, at its edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registries import PROVENANCE

from meadow.peft_adapters.signed_adapter import Verified
from meadow.server.registry_gates import AllOf, Checked, LineageGate, LossGate, Verdict
from meadow.server.registry_rows import Version


def checked(number: int = 1, **stated: Any) -> Checked:
    facts = replace(PROVENANCE, **{"run_id": str(number), **stated})
    version = Version("mail", number, f"{number:064x}", "", 0, 0.0, {})
    return Checked(version, Verified(version.id, facts, (), 8, 2.0, ("F32",), 1))


LOSS = st.floats(0.0, 10.0)


@given(LOSS, LOSS, st.floats(0.0, 2.0))
def test_the_loss_may_grow_by_so_much(new: float, old: float, most: float) -> None:
    verdict = LossGate(most).check(
        checked(2, loss=new, base_loss=20.0), checked(1, loss=old, base_loss=20.0)
    )
    assert verdict.passed == (new <= old + most) == (not verdict.reasons)
    assert new in verdict.figures.values()


@given(LOSS, LOSS)
def test_nothing_may_be_worse_than_its_base(loss: float, base: float) -> None:
    assert LossGate().check(checked(loss=loss, base_loss=base), None).passed == (loss <= base)


def test_losses_of_other_rows_are_not_compared() -> None:
    verdict = LossGate(9.0).check(checked(2, base_loss=2.6), checked(1, base_loss=2.5))
    assert verdict.reasons == ("it and mail@v1 were not measured on the same rows",)
    assert LossGate().check(checked(2, base_loss=2.5001), checked(1, base_loss=2.5)).passed
    other = checked(1, base_digest="0")
    assert not LossGate().check(checked(2), other).passed


def test_rows_of_one_digest_are_the_same_rows() -> None:
    same = {"held_out_digest": "d", "dtype": "float32"}
    old = checked(1, base_loss=2.5, **same)
    assert LossGate().check(checked(2, base_loss=2.6, **same), old).passed
    for other in ({"held_out_digest": "e"}, {"held_out_digest": "d", "dtype": "bfloat16"}):
        verdict = LossGate(9.0).check(checked(2, **{**same, **other}), old)
        assert verdict.reasons == ("it and mail@v1 were not measured on the same rows",)


def test_a_loss_in_another_precision_does_not_count() -> None:
    verdict = LossGate(9.0, "bfloat16").check(checked(dtype="float32"), None)
    assert verdict.reasons == ("its loss was measured in float32, it is served in bfloat16",)
    assert LossGate(9.0, "bfloat16").check(checked(dtype="bfloat16"), None).passed
    assert LossGate(9.0, "bfloat16").check(checked(), None).passed, "an older manifest says nothing"


def test_a_test_of_one_name_is_compared() -> None:
    old = checked(1, base_loss=None, evaluations={"triage": 1.0, "letters": 2.0})
    same = {"base_loss": 9.0, "loss": 3.0}
    assert LossGate().check(checked(2, evaluations={"triage": 1.0}, **same), old).passed
    worse = LossGate().check(checked(2, evaluations={"triage": 1.1, "letters": 1.0}, **same), old)
    assert len(worse.reasons) == 1 and "'triage'" in worse.reasons[0]
    assert not LossGate().check(checked(2, evaluations={"other": 0.0}, **same), old).passed


@pytest.mark.parametrize("current", [None, checked(1)])
def test_what_was_never_measured_is_refused(current: Checked | None) -> None:
    unknown = checked(2, loss=None)
    assert LossGate(9.0).check(unknown, current).reasons == (
        "its manifest states no held-out loss",
    )


@pytest.mark.parametrize(
    ("candidate", "current", "said"),
    [
        (checked(2), checked(1), ""),
        (checked(2), None, ""),
        (checked(1), checked(1), ""),
        (checked(1), checked(2), "older than mail@v2"),
        (checked(2, base_digest="x"), checked(1), "another base"),
        (checked(2, run_id="r", rounds=5), checked(1, run_id="r", rounds=4), ""),
        (checked(1, run_id="r", rounds=5), checked(2, run_id="r", rounds=4), ""),
        (checked(2, run_id="r", rounds=4), checked(1, run_id="r", rounds=4), "4 rounds"),
        (checked(2, run_id="r", rounds=3), checked(1, run_id="r", rounds=4), "3 rounds"),
    ],
)
def test_lineage(candidate: Checked, current: Checked | None, said: str) -> None:
    verdict = LineageGate().check(candidate, current)
    assert verdict.passed == (not said)
    assert said in "; ".join(verdict.reasons)


def test_descent() -> None:
    gate, current = LineageGate(descends=True), checked(1)
    assert gate.check(checked(2, parents=(current.version.id,)), current).passed
    assert gate.check(checked(2, run_id="1", rounds=2), current).passed
    assert "not trained from" in gate.check(checked(2, parents=("0",)), current).reasons[0]


class Says:
    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        return self.verdict


def test_all_of_them_have_their_say() -> None:
    no = [Says(Verdict(False, (text,), {text: 1.0})) for text in "ab"]
    verdict = AllOf([no[0], Says(Verdict(True, (), {"c": 2.0})), no[1]]).check(checked(), None)
    assert verdict == Verdict(False, ("a", "b"), {"a": 1.0, "c": 2.0, "b": 1.0})
    assert AllOf([]).check(checked(), None).passed
