"""The gate that measures: its rules at their edges, over figures that are given to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registries import BASE, adapter, open_registry

from meadow.errors import ConfigError, ModelError, PromotionError
from meadow.server import measured_gate
from meadow.server.measured_gate import HELD_OUT, Answers, MeasuredGate, Question, Serving
from meadow.server.registry import Registry
from meadow.server.registry_gates import Checked

HOW = Serving("tiny", "bfloat16", "4bit", "cpu", 64)
LOSS = st.floats(0.0, 10.0)


class Given:
    """Answers with these figures, and keeps what was asked."""

    def __init__(self, base: float, losses: list[float], said: str = "cloth") -> None:
        self.base, self.losses, self.said = base, losses, said
        self.asked: list[Question] = []

    def __call__(self, question: Question) -> Answers:
        self.asked.append(question)
        canaries = 1 if question["canaries"] else 0
        found = [{"loss": loss, "answers": [self.said] * canaries} for loss in self.losses]
        return {"rows": 3, "base_loss": self.base, "versions": found}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path) as registry:
        for number in (1, 2):
            registry.keep("mail", adapter(number))
        yield registry


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def canaries(tmp_path: Path) -> str:
    path = tmp_path / "canaries.jsonl"
    path.write_text(json.dumps({"prompt": "What is a loom?", "contains": "cloth"}))
    return str(path)


def checked(registry: Registry, number: int) -> Checked:
    version = registry.resolve(f"mail@v{number}")
    return Checked(version, registry.verify(version))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(LOSS, LOSS, LOSS, st.floats(0.0, 2.0))
def test_loss_is_held_against_the_base_and_the_current_version(
    registry: Registry, rows: str, new: float, old: float, base: float, most: float
) -> None:
    gate = MeasuredGate(registry, HOW, rows, max_increase=most, measure=Given(base, [new, old]))
    verdict = gate.check(checked(registry, 2), checked(registry, 1))
    assert verdict.passed == (new <= old + most and new <= base + most) == (not verdict.reasons)
    assert verdict.figures[HELD_OUT] == new


def test_a_loss_that_is_no_number_is_refused(registry: Registry, rows: str) -> None:
    gate = MeasuredGate(registry, HOW, rows, measure=Given(1.0, [float("nan"), 1.0]))
    assert len(gate.check(checked(registry, 2), checked(registry, 1)).reasons) == 2


def test_it_asks_in_the_precision_of_serving(registry: Registry, rows: str, canaries: str) -> None:
    given = Given(2.0, [1.0])
    gate = MeasuredGate(registry, HOW, rows, canaries, measure=given)
    assert gate.check(checked(registry, 2), None).passed
    (asked,) = given.asked
    assert json.loads(json.dumps(asked)) == {
        "base": "tiny", "dtype": "bfloat16", "quantize": "4bit", "device": "cpu",
        "max_length": 64, "base_digest": BASE, "held_out": rows, "canaries": canaries,
        "versions": [{"id": adapter(2).id, "folder": str(_folder(registry, 2))}],
    }  # fmt: skip


def _folder(registry: Registry, number: int) -> Path:
    return registry.folder / "versions" / adapter(number).id


def test_a_refused_promotion_says_which_canary_and_why(registry: Registry, canaries: str) -> None:
    gate = MeasuredGate(registry, HOW, canaries=canaries, measure=Given(9.0, [None], "no idea"))  # type: ignore[list-item]
    with pytest.raises(PromotionError, match="loom.*answered 'no idea', which lacks 'cloth'"):
        registry.promote("mail@v2", gate=gate)
    assert registry.history("mail")[-1].kind == "refused" and registry.aliases() == []
    passing = MeasuredGate(registry, HOW, canaries=canaries, measure=Given(9.0, [9.9]))
    assert registry.promote("mail@v2", gate=passing).number == 2, "no rows: no loss is compared"


def test_what_cannot_be_measured_is_refused(registry: Registry, rows: str) -> None:
    def broken(question: Question) -> Answers:
        raise ModelError("no usable GPU found")

    verdict = MeasuredGate(registry, HOW, rows, measure=broken).check(checked(registry, 2), None)
    assert verdict.reasons == ("it could not be measured: no usable GPU found",)


def test_a_process_is_asked_in_json_and_answers_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """json.tool says what it is given; `test_measure_versions` has the real one."""
    monkeypatch.setattr(measured_gate, "_MEASURE", "json.tool")
    assert measured_gate.in_own_process({"base": "nano"}) == {"base": "nano"}
    monkeypatch.setattr(measured_gate, "_MEASURE", "no.such.module")
    with pytest.raises(ModelError, match="No module named"):
        measured_gate.in_own_process({})


@pytest.mark.parametrize("part", ["held_out", "canaries"])
def test_files_that_are_not_there(registry: Registry, tmp_path: Path, part: str) -> None:
    files: dict[str, Any] = {part: str(tmp_path / "nowhere.toml")}
    with pytest.raises(ConfigError, match="nowhere.toml"):
        MeasuredGate(registry, HOW, **files)
