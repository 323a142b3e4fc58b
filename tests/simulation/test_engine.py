"""Whole runs over a tiny llama: what they leave behind, and that it means what it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Numbered
from peft import PeftModel
from safetensors.torch import load_file
from tiny import CLIENTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from meadow import config as toml
from meadow.config import Config
from meadow.errors import ConfigError, DataError, JournalError, QuorumError
from meadow.events import Event
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.simulation.engine import Lab, Result, open_lab, personal_folder, simulate


def run(config: Config, folder: Path, lab: Lab, **more: Any) -> Result:
    return simulate(config, folder, lab, disk=Numbered(folder.parent), **more)


@pytest.fixture(scope="module")
def result(tiny: Config, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tiny, tmp_path_factory.mktemp("run") / "out", lab)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors(result: Result) -> dict[str, torch.Tensor]:
    return dict(load_file(result.adapter / "adapter_model.safetensors"))


def distance(one: Result, other: Result) -> float:
    """The largest difference between the weight changes of two runs' adapters."""
    trees = [load_adapter(result.adapter).tree for result in (one, other)]
    modules = {name.rpartition(".")[0] for name in trees[0]}
    a, b = ([tree[f"{m}.lora_B"] @ tree[f"{m}.lora_A"] for m in sorted(modules)] for tree in trees)
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


# What a run leaves behind


def test_a_folder_tells_its_run(tiny: Config, result: Result) -> None:
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {"adapter", "metrics.jsonl", "events.jsonl", "journal.db", "run.toml"}
    assert names >= {"manifest.json"} and not list(result.folder.rglob("*.draft"))
    assert toml.load(result.folder / "run.toml") == tiny
    assert lines(result.folder / "metrics.jsonl") == [dict(row) for row in result.metrics]
    assert [row["round"] for row in result.metrics] == [0, 1, 2]
    assert result.metrics[2]["losses"].keys() == set(CLIENTS)
    assert result.metrics[2]["train_loss"].keys() == set(CLIENTS)


def test_events_tell_the_story_in_order(result: Result) -> None:
    rows = lines(result.folder / "events.jsonl")
    round = ["round_opened", *["contribution"] * 3, "round_closed"]
    assert [row["kind"] for row in rows] == ["run_started", *round, *round, "run_finished"]
    assert [row["client"] for row in rows if row["kind"] == "contribution"] == [*CLIENTS] * 2
    sent = [row["bytes"] for row in rows if row["kind"] == "contribution"]
    assert [sum(sent[:3]), sum(sent[3:])] == [row["bytes_up"] for row in result.metrics[1:]]


def test_an_observer_sees_what_the_log_sees(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    seen: list[Event] = []
    done = run(tiny, tmp_path / "out", lab, observer=seen.append)
    kinds = [row["kind"] for row in lines(done.folder / "events.jsonl")]
    assert [event.kind for event in seen] == kinds


def test_training_helps_and_leaves_the_base_alone(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    def weights() -> bytes:
        state = sorted(lab.base.model.state_dict().items())
        return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in state)).digest()

    before = weights()
    done = run(tiny.replace(rounds={"count": 4}), tmp_path / "out", lab)
    assert done.loss < done.base_loss - 0.05 and weights() == before


def held_out(tiny: Config, client: str = "") -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in Path(tiny.data.source).read_text().splitlines()]
    return [
        (row["prompt"] + "\n", row["response"])
        for row in rows
        if row["split"] == "test" and client in ("", row["client"])
    ]


def plain_loss(tiny: Config, adapter: Path | None, rows: list[tuple[str, str]]) -> float:
    """The mean over response tokens by transformers and PEFT alone, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.base)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.model.base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total, count = 0.0, 0
    for prompt, response in rows:
        before = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        after = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
        for place, token in enumerate(after, start=len(before)):
            total -= float(logits[place - 1].log_softmax(-1)[token])
            count += 1
    return total / count


def test_the_adapter_reproduces_the_loss_in_plain_peft(tiny: Config, result: Result) -> None:
    rows = held_out(tiny)
    assert plain_loss(tiny, None, rows) == pytest.approx(result.base_loss, abs=1e-5)
    assert plain_loss(tiny, result.adapter, rows) == pytest.approx(result.loss, abs=1e-5)
    for client in CLIENTS:
        own = plain_loss(tiny, result.adapter, held_out(tiny, client))
        assert own == pytest.approx(result.losses[client], abs=1e-5)


def test_personal_adapters_reproduce_their_owners_losses(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    done = run(tiny.replace(strategy={"name": "fedsa_lora"}), tmp_path / "out", lab)
    for client in CLIENTS:
        own = plain_loss(tiny, personal_folder(done.folder, client), held_out(tiny, client))
        assert own == pytest.approx(done.losses[client], abs=1e-5)


# Equalities


def test_equal_runs_are_equal_to_the_bit(
    tiny: Config, lab: Lab, result: Result, tmp_path: Path
) -> None:
    again = run(tiny, tmp_path / "out", lab)
    mine, other = tensors(again), tensors(result)
    assert mine.keys() == other.keys() and again.metrics == result.metrics
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_another_seed_is_another_run(
    tiny: Config, lab: Lab, result: Result, tmp_path: Path
) -> None:
    other = run(tiny.replace(rounds={"seed": 2}), tmp_path / "out", lab)
    assert distance(other, result) > 1e-4


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedavg_lora", {}), ("fedavg_lora", {"refine": "none", "keep_optimizer": True}),
        ("diloco", {}), ("flora", {}), ("fedsa_lora", {}),
    ],
)  # fmt: skip
def test_fused_equals_sequential(
    tiny: Config, lab: Lab, tmp_path: Path, strategy: str, options: dict[str, Any], group: int
) -> None:
    config = tiny.replace(strategy={"name": strategy, "options": options})
    fused = config.replace(simulation={"engine": "fused", "group": group})
    one, many = run(config, tmp_path / "one", lab), run(fused, tmp_path / "many", lab)
    assert distance(one, many) < 1e-5
    for row, other in zip(one.metrics, many.metrics, strict=True):
        assert row["losses"] == pytest.approx(other["losses"], abs=1e-5)


# Faults


def without_rows(lab: Lab, *clients: str) -> Lab:
    people = tuple(replace(p, train=()) if p.name in clients else p for p in lab.participants)
    return replace(lab, participants=people)


@pytest.mark.parametrize("engine", ["sequential", "fused"])
def test_one_clients_fault_is_named_and_the_round_goes_on(
    tiny: Config, lab: Lab, tmp_path: Path, engine: str
) -> None:
    config = tiny.replace(simulation={"engine": engine, "group": 3})
    done = run(config, tmp_path / "out", without_rows(lab, "bob"))
    for row in done.metrics[1:]:
        assert row["refused"] == {"bob": "participant 'bob' has no training rows"}
        assert row["contributions"] == 2 and row["train_loss"].keys() == {"ada", "eve"}
    refused = [row for row in lines(done.folder / "events.jsonl") if row["kind"] == "refused"]
    assert [row["client"] for row in refused] == ["bob", "bob"]


def test_too_many_faults_end_the_run_by_name(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"1 of 3 contributions.*ada: .*; bob: .*no training"):
        run(tiny, tmp_path / "out", without_rows(lab, "ada", "bob"))


def test_a_finished_run_only_tells_again(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    first, seen = run(tiny, tmp_path / "out", lab), list[Event]()
    before = tensors(first)
    again = run(tiny, tmp_path / "out", lab, observer=seen.append)
    assert [event.kind for event in seen] == ["run_started", "run_finished"]
    assert again.metrics == first.metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(again).items())


def test_a_pool_that_could_not_be_exported_is_refused_before_the_work(tiny: Config) -> None:
    """Its signs may have more columns than one matrix has, but not than all of them."""
    wide = tiny.replace(strategy={"name": "fedkseed", "options": {}})
    assert open_lab(wide.replace(model={"rank": 16, "alpha": 16.0})).layers
    with pytest.raises(ConfigError, match=r"larger than every adapted layer \(at most 16\)"):
        open_lab(wide.replace(model={"rank": 32, "alpha": 32.0}))


def test_a_folder_belongs_to_its_settings(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", lab)
    with pytest.raises(JournalError, match="holds a run with other settings"):
        run(tiny.replace(clients={"lr": 1e-3}), tmp_path / "out", lab)
    other = replace(lab, bench=replace(lab.bench, base=replace(lab.base, digest="0" * 64)))
    with pytest.raises(JournalError, match="another base model"):
        run(tiny, tmp_path / "out", other)


def test_another_thread_count_is_told(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", lab)
    torch.set_num_threads(2)
    try:
        again = run(tiny, tmp_path / "out", lab)
    finally:
        torch.set_num_threads(1)
    (notice,) = again.notices
    assert "threads 1 -> 2" in notice and "cannot be promised" in notice


def test_a_rank_that_no_layer_has_is_refused(tiny: Config) -> None:
    with pytest.raises(ConfigError, match=r"rank = 9 .*8 x 16.*at most 8"):
        open_lab(tiny.replace(model={"rank": 9}))


def test_nothing_to_measure_is_refused(tiny: Config, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"client": "ada", "text": "abc", "split": "train"}\n')
    with pytest.raises(DataError, match="no participant has held-out rows"):
        open_lab(tiny.replace(data={"source": str(rows)}))


def test_an_unknown_strategy_is_found_before_the_model_is_loaded(tiny: Config) -> None:
    config = tiny.replace(strategy={"name": "fedavg"}, model={"base": "/nowhere"})
    with pytest.raises(ConfigError, match="did you mean 'fedavg_lora'"):
        open_lab(config)


def test_long_rows_are_counted_by_participant(tiny: Config) -> None:
    lab = open_lab(tiny.replace(data={"max_length": 14}))
    assert lab.truncated == dict.fromkeys(CLIENTS, 5)


def test_who_was_asked_to_spare_counts_a_round_later_where_that_is_asked_for(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    """All three are asked, the first two are waited for; the third counts in the next round."""
    config = tiny.replace(rounds={"count": 3, "fraction": 0.5, "spare": 0.5})
    patient = config.replace(strategy={"options": {"late": 1}})
    dropped = run(config, tmp_path / "dropped", lab)
    first, again = (run(patient, tmp_path / name, lab) for name in ("first", "again"))
    spared = [row["missing"] for row in first.metrics[1:]]
    assert [len(names) for names in spared] == [1, 1, 1]
    late = [row.get("late") for row in first.metrics[1:]]
    assert late == [None, [[1, *spared[0]]], [[2, *spared[1]]]]
    events = [row for row in lines(first.folder / "events.jsonl") if row["kind"] == "late"]
    assert [row.get("counts_in") for row in events] == [2, 3, None]  # after the last is no round
    assert distance(first, again) == 0.0 and distance(first, dropped) > 0.0
    assert all("late" not in row for row in dropped.metrics)
