"""The baseline does the work that it is compared with, and its report is read as it is meant."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from peft import get_peft_model_state_dict
from transformers import AutoTokenizer

from meadow.client.encode import collate, encode
from meadow.client.rows import Row
from meadow.nano import FOLDER
from meadow.processes import Program
from meadow.simulation import flower_identity, plain_flower, plain_flower_app
from meadow.simulation.deploy_overhead import BATCH, MAX_LENGTH, RATE, write_rows
from meadow.simulation.plain_flower import PlainRound, rounds_of, write_app


def test_rounds_are_read_from_the_report() -> None:
    """The first round, which starts the node's first process, is left out."""
    figures = {str(n): {"work": n / 8, "loading": 2.0, "loss": 1.0} for n in (1, 2, 3)}
    report = {"ended": [100.0, 130.0, 142.0, 155.0], "metrics": figures}
    assert rounds_of(report) == [PlainRound(12.0, 0.25, 2.0), PlainRound(13.0, 0.375, 2.0)]
    assert rounds_of(report)[0].rest == 9.75


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """What `flwr run` would give the app."""
    write_rows(tmp_path / "rows.jsonl")
    project = write_app(tmp_path, 3, tmp_path / "rows.jsonl", tmp_path / "report.json")
    tables = tomllib.loads((project / "pyproject.toml").read_text())
    components = tables["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "plain.app:server", "clientapp": "plain.app:client"}
    copied = (project / "plain" / "app.py").read_text()
    assert copied == Path(plain_flower_app.__file__).read_text() and "meadow.sim" not in copied
    found: dict[str, Any] = tables["tool"]["flwr"]["app"]["config"]
    assert found["rounds"] == 3 and found["model"] == str(FOLDER)
    return found


def test_its_batch_is_the_one_that_meadow_trains_on(settings: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    batch = plain_flower_app.load_batch(settings, tokenizer)
    lines = Path(settings["rows"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    mine = [Row("a", r["prompt"], r["response"], "", "") for r in rows if r["split"] == "train"]
    ids, mask, labels = collate(encode(mine, tokenizer, MAX_LENGTH).examples)
    assert len(mine) == BATCH and len(rows) == BATCH + 1
    assert torch.equal(batch["labels"], labels) and torch.equal(batch["attention_mask"], mask)
    assert torch.equal(batch["input_ids"] * mask, ids * mask)


def test_a_message_is_answered_with_one_step(settings: dict[str, Any]) -> None:
    """Against the same step taken by hand, from the weights that were sent."""
    torch.manual_seed(3)
    model = plain_flower_app.load_model(settings)
    sent = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    batch = plain_flower_app.load_batch(settings, tokenizer)
    loss = plain_flower_app.take_step(model, batch, RATE)
    expected = get_peft_model_state_dict(model)
    reply = answered(settings, sent)
    trained, figures = reply.content["arrays"], reply.content["metrics"]
    assert isinstance(trained, ArrayRecord)
    got = trained.to_torch_state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in got)
    assert any(not torch.equal(got[name], sent[name]) for name in got)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5) and figures["num-examples"] == BATCH
    assert figures["work"] > 0 and figures["loading"] > 0  # type: ignore[operator]


def answered(settings: dict[str, Any], arrays: dict[str, torch.Tensor]) -> Message:
    flower_identity.assume()
    message = Message(RecordDict({"arrays": ArrayRecord(arrays)}), 1, "train")
    flower_identity.name_message(message.metadata, "m1")
    threads = torch.get_num_threads()
    try:
        return plain_flower_app.client(message, Context(1, 1, {}, RecordDict(), dict(settings)))
    finally:
        torch.set_num_threads(threads)


def test_flowers_own_settings_are_left_to_it() -> None:
    variables = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "FLWR_TELEMETRY_ENABLED": "0"}
    program = Program("superlink", lambda: ["x"], variables)
    assert plain_flower._plain(program).environment == {"FLWR_TELEMETRY_ENABLED": "0"}
