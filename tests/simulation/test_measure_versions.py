"""Versions measured as they are served: equal to what the run itself measured, and to the words
that a plain greedy loop gives; in other precisions too, and in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from meadow.config import Config
from meadow.errors import AdapterError, MeadowError, ModelError, PromotionError
from meadow.identity import own_identity
from meadow.server.measured_gate import MeasuredGate, Serving
from meadow.server.registry import Registry
from meadow.server.registry_runs import publish_run
from meadow.simulation.engine import Lab, Result, simulate
from meadow.simulation.measure_versions import measure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Config, lab: Lab) -> Result:
    return simulate(tiny, tmp_path_factory.mktemp("run"), lab)


@pytest.fixture
def registry(tmp_path: Path, run: Result) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry", own_identity()) as registry:
        publish_run(registry, run.folder, "mail")
        yield registry


@pytest.fixture
def rows(tmp_path: Path, tiny: Config) -> Path:
    """The run's held-out rows, and no other."""
    lines = Path(tiny.data.source).read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["split"] == "test"]
    (tmp_path / "rows.jsonl").write_text("\n".join(kept))
    return tmp_path / "rows.jsonl"


def question(registry: Registry, tiny: Config, **changed: Any) -> dict[str, Any]:
    version = registry.resolve("mail@v1")
    return {
        "base": tiny.model.base, "dtype": "float32", "quantize": "none", "device": "cpu",
        "max_length": 32, "base_digest": version.facts["base_digest"], "held_out": "",
        "canaries": "", **changed,
        "versions": [{"id": version.id, "folder": str(registry.folder / "versions" / version.id)}],
    }  # fmt: skip


def test_the_losses_are_those_of_the_run(
    registry: Registry, tiny: Config, run: Result, rows: Path
) -> None:
    found = measure(question(registry, tiny, held_out=str(rows)))
    assert found["rows"] == 6
    assert found["base_loss"] == pytest.approx(run.base_loss, abs=1e-5)
    assert found["versions"][0]["loss"] == pytest.approx(run.loss, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_precision_gives_other_losses(
    registry: Registry, tiny: Config, run: Result, rows: Path, dtype: str
) -> None:
    found = measure(question(registry, tiny, held_out=str(rows), dtype=dtype))
    loss = found["versions"][0]["loss"]
    assert loss != run.loss and loss == pytest.approx(run.loss, abs=0.05)


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_too(
    registry: Registry, tiny: Config, run: Result, rows: Path, quantize: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    found = measure(question(registry, tiny, held_out=str(rows), quantize=quantize))
    assert found["versions"][0]["loss"] == pytest.approx(run.loss, abs=0.3)


@pytest.mark.parametrize("kind", ["prompt", "text"])
def test_answers_are_those_of_peft(
    registry: Registry, tiny: Config, run: Result, tmp_path: Path, kind: str
) -> None:
    """The reference: PEFT's own model, one argmax after the other."""
    (tmp_path / "c.jsonl").write_text(json.dumps({kind: "say a", "lacks": "Z", "tokens": 6}))
    found = measure(question(registry, tiny, canaries=str(tmp_path / "c.jsonl")))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.base)
    base = AutoModelForCausalLM.from_pretrained(tiny.model.base)
    model = PeftModel.from_pretrained(base, run.adapter).eval()
    text = "say a" + ("\n" if kind == "prompt" else "")
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    for _ in range(6):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    assert found["versions"][0]["answers"] == [
        tokenizer.decode(ids[start:], skip_special_tokens=True)
    ]


def test_another_base_and_other_bytes_are_refused(registry: Registry, tiny: Config) -> None:
    with pytest.raises(ModelError, match="was trained on eeeeeeeeeeee"):
        measure(question(registry, tiny, base_digest="e" * 64))
    asked = question(registry, tiny)
    asked["versions"][0]["id"] = "f" * 64
    with pytest.raises(AdapterError, match="was changed after it was verified"):
        measure(asked)


def test_rows_that_cannot_be_used(registry: Registry, tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(MeadowError, match="rows.jsonl line 1"):
        measure(question(registry, tiny, held_out=str(tmp_path / "rows.jsonl")))


@pytest.mark.long
def test_in_a_process_of_its_own(registry: Registry, tiny: Config, rows: Path) -> None:
    """The whole way: a canary that cannot pass, then rows alone, then a base that is not there."""
    file = rows.with_name("canaries.jsonl")
    file.write_text(json.dumps({"prompt": "say a", "contains": "Q"}))
    how = Serving(tiny.model.base, "bfloat16", device="cpu", max_length=32)
    with pytest.raises(PromotionError, match="'say a' was answered .*, which lacks 'Q'"):
        registry.promote("mail@v1", gate=MeasuredGate(registry, how, str(rows), str(file), 1.0))
    registry.promote("mail@v1", gate=MeasuredGate(registry, how, str(rows), "", 1.0))
    assert any("as it is served" in key for key in registry.history("mail")[-1].figures)
    gone = Serving(str(rows.with_name("nowhere")))
    with pytest.raises(PromotionError, match="could not be measured: .*no such folder"):
        registry.promote("mail@v1", "canary", MeasuredGate(registry, gone, str(rows)))
