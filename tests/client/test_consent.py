"""What a participant reads before it agrees is what the run would do, and what it would send."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from homes import make_home, message, set_policy, terms_json

from meadow.client.consent import Offer
from meadow.client.home import POLICY, terms_in
from meadow.client.policy import Policy
from meadow.client.resident_trainer import ResidentTrainer
from meadow.client.trainer_link import TRAIN
from meadow.config import Config
from meadow.display import bytes_text
from meadow.errors import DataError, FormatError, ModelError, PolicyError
from meadow.terms import Terms


def offered(folder: Path, config: Config, **rules: Any) -> Offer:
    terms = Terms.parse(terms_json(config))
    policy = Policy(data=[str(folder / "rows.jsonl")])
    return Offer.look(terms, dataclasses.replace(policy, **rules), "ada")


@pytest.fixture
def folder(tiny: Config, tmp_path: Path) -> Path:
    return make_home(tmp_path / "ada", tiny)


STRATEGIES = [
    {},
    {"clients": {"wire": "bfloat16", "clip_update": 0.5}},
    {"strategy": {"name": "rolora"}},
    {"strategy": {"name": "fedsa_lora"}},
    {"strategy": {"name": "diloco"}},
    {"strategy": {"name": "fedkseed"}, "model": {"rank": 4, "alpha": 4.0}},
]


@pytest.mark.parametrize("changes", STRATEGIES, ids=lambda c: str(c.get("strategy", c)))
def test_the_size_that_is_told_is_the_size_that_is_sent(
    tiny: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The trainer's own answer to round 1, to within a few letters of its notes."""
    config = tiny.replace(**changes)
    folder = make_home(tmp_path / "ada", config)
    offer = offered(folder, config)
    with ResidentTrainer(folder) as trainer:
        sent = len(trainer.handle(TRAIN, message(config)))
    assert offer.up[0] - 80 <= sent <= offer.up[1] + 80
    text = "\n".join(offer.lines())
    assert bytes_text(offer.up[1]) in text


def test_a_person_reads_how_many_rows_what_leaves_and_what_does_not(
    tiny: Config, folder: Path
) -> None:
    text = "\n".join(offered(folder, tiny.replace(clients={"clip_update": 0.5})).lines())
    assert "6 rows to train on, 2 held out" in text
    assert str(folder / "rows.jsonl") in text and tiny.model.base in text
    assert re.search(
        r"an update .*, its norm at most 0.5: [\d.]+ kB a round, [\d.]+ kB in all", text
    )
    assert "never leaves   text, tokens" in text and "no noise is added" in text


def test_the_terms_caps_on_rows_count(tiny: Config, folder: Path) -> None:
    offer = offered(folder, tiny.replace(data={"train_rows": 3, "held_out_rows": 1}))
    assert (len(offer.silo.train), len(offer.silo.held_out)) == (3, 1)


def test_text_that_cannot_be_used_is_named_with_its_line(tiny: Config, folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    with pytest.raises(DataError, match="rows.jsonl line 2: malformed JSON"):
        offered(folder, tiny)
    (folder / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows in"):
        offered(folder, tiny)


def test_ones_own_rules_come_before_the_question(tiny: Config, folder: Path) -> None:
    with pytest.raises(PolicyError, match="2 steps a round .*at most 1 here"):
        offered(folder, tiny, most_steps=1)


def test_a_base_that_is_missing_or_another_is_said(
    tiny: Config, folder: Path, tmp_path: Path
) -> None:
    moved = tiny.replace(model={"base": "/nowhere/base"})
    terms = json.loads(terms_json(tiny))
    terms["config"]["model"]["base"] = "/nowhere/base"
    terms["config_digest"] = moved.shared().digest()
    found = Terms.parse(json.dumps(terms))
    rules = Policy(data=[str(folder / "rows.jsonl")])
    with pytest.raises(ModelError, match=r"/nowhere/base.*with --base"):
        Offer.look(found, rules, "ada")
    copy = shutil.copytree(tiny.model.base, tmp_path / "copy")
    here = dataclasses.replace(rules, base=str(copy))
    assert Offer.look(found, here, "ada").strategy.name == "fedavg_lora"
    with pytest.raises(FormatError, match=r"is another than the run's .*--base"):
        Offer.look(found, dataclasses.replace(rules, base="nano"), "ada")


def test_agreeing_is_what_lets_the_trainer_start(tiny: Config, folder: Path) -> None:
    """The same rules that the offer was looked at with, approved."""
    terms = terms_in(folder)
    Policy.load(folder / POLICY).check_terms(terms)
    set_policy(folder, terms="00" * 32, data=["rows.jsonl"])
    with pytest.raises(PolicyError, match="not those that were approved"):
        ResidentTrainer(folder)
