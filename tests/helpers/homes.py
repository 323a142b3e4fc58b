"""Participants' folders of a deployed run over the tiny base, and the messages of its rounds."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

from meadow import __version__
from meadow.client.home import MEMBERSHIP, POLICY, TERMS, terms_in
from meadow.client.policy import Policy
from meadow.config import Config, ModelConfig, to_json
from meadow.peft_adapters.blueprint import Blueprint, open_blueprint
from meadow.store import Disk
from meadow.strategies.base import Turn
from meadow.strategies.messages import pack_update, turn_to_json
from meadow.strategies.registry import strategy_of

RUN = "0123abcd"
COORDINATOR = "c0" * 32
NAMES = ("ada", "bob", "eve")


@cache
def blueprint(base: str) -> Blueprint:
    return open_blueprint(ModelConfig(base=base))


def terms_json(config: Config, /, **changes: Any) -> bytes:
    """The terms of a run, as its coordinator writes them."""
    shared = config.shared()
    tables = to_json(shared)
    del tables["data"]["source"]
    fields = {
        "format": 1,
        "run": RUN,
        "config": tables,
        "config_digest": shared.digest(),
        "base_digest": blueprint(config.model.base).digest,
        "bundle": "bb" * 32,
        "coordinator": COORDINATOR,
        "meadow": __version__,
    }
    return json.dumps({**fields, **changes}).encode()


def own_rows(source: Path, name: str) -> str:
    """The lines of a JSON lines file that are one client's, without its name."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    mine = [
        {k: v for k, v in row.items() if k != "client"} for row in rows if row["client"] == name
    ]
    return "".join(json.dumps(row) + "\n" for row in mine)


def make_home(folder: Path, config: Config, name: str = "ada", **rules: Any) -> Path:
    """A participant's folder as after joining, its own text in it."""
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    (folder / MEMBERSHIP).write_text(json.dumps({"name": name}))
    (folder / TERMS).write_bytes(terms_json(config))
    (folder / "rows.jsonl").write_text(own_rows(Path(config.data.source), name))
    set_policy(folder, data=["rows.jsonl"], **rules)
    return folder


def set_policy(folder: Path, **rules: Any) -> None:
    """Rules for the terms in the folder, which count as approved."""
    policy = Policy().approving(terms_in(folder))
    dataclasses.replace(policy, **rules).save(folder / POLICY, Disk())


def message(config: Config, /, round: int = 1, name: str = "ada", **header: Any) -> bytes:
    """What a coordinator sends that still has its first state."""
    rounds, clients = config.rounds, config.clients
    total = rounds.count * clients.steps
    turn = Turn(round, rounds.count, rounds.seed, clients.steps, total, name, NAMES)
    base = blueprint(config.model.base)
    strategy = strategy_of(config, base.layers, base.digest)
    sent = strategy.broadcast(strategy.init(rounds.seed), turn)
    fields = {"turn": turn_to_json(turn), "run": RUN, "config": config.shared().digest()}
    return pack_update(sent, **{**fields, **header})
