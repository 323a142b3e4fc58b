"""Versions of an adapter, measured as they are served: loss on held-out rows, answers to canaries.

    python -m meadow.simulation.measure_versions < question.json > answers.json

`server.measured_gate` says what is asked and answered.  What cannot be measured ends with status 2
and one line on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..client.encode import Example, encode, prompt_ids
from ..client.sources import read_rows
from ..client.trainer import Trainer, response_tokens
from ..client.workbench import Workbench, open_workbench
from ..config import Config
from ..errors import AdapterError, MeadowError, ModelError
from ..peft_adapters.adapter_reader import check_fits, read_outline
from ..peft_adapters.layout import Tree
from ..peft_adapters.manifest import MANIFEST
from ..peft_adapters.signed_adapter import SignedAdapter
from ..server.canaries import Canary, read_canaries
from ..server.measured_gate import Answers, Question
from ..strategies.base import Loss
from .sample import complete


def measure(question: Question) -> Answers:
    """Answer a question.  Raises MeadowError."""
    config = Config().replace(
        model={key: question[key] for key in ("base", "dtype", "quantize", "device")},
        data={"max_length": 8},  # rows are cut to the model's own context below
    )
    bench = open_workbench(config)
    if bench.base.digest != question["base_digest"]:
        raise ModelError(
            f"{bench.base.name} is base {bench.base.digest[:12]},"
            f" the adapter was trained on {question['base_digest'][:12]}"
        )
    rows = _rows(bench, question["held_out"], question["max_length"])
    canaries = read_canaries(Path(question["canaries"])) if question["canaries"] else []
    trees = [_tree(bench, version) for version in question["versions"]]
    trainer = Trainer(bench.bank, config.clients, bench.pad)

    def loss(tree: Tree) -> float | None:
        return trainer.loss(Loss(tree), rows).loss if rows else None

    return {
        "rows": len(rows),
        "base_loss": loss(bench.blank()),
        "versions": [
            {"loss": loss(tree), "answers": [_answer(bench, tree, one) for one in canaries]}
            for tree in trees
        ],
    }


def _rows(bench: Workbench, source: str, max_length: int) -> Sequence[Example]:
    """All rows of a file, whatever split they name."""
    if not source:
        return ()
    rows = read_rows(source, Config().data.chunk)
    context = getattr(bench.base.model.config, "max_position_embeddings", max_length)
    found = encode(rows, bench.base.tokenizer, min(max_length, context)).examples
    if not response_tokens(found):
        raise ModelError(f"{source} has no token whose loss could be measured")
    return found


def _tree(bench: Workbench, version: dict[str, Any]) -> Tree:
    """The very bytes that were verified under this id."""
    folder = Path(version["folder"])
    files = SignedAdapter.read(folder, folder / MANIFEST)
    if files.id != version["id"]:
        raise AdapterError(f"{folder} was changed after it was verified")
    check_fits(read_outline(folder, files.config, files.weights), bench.layers, folder)
    return bench.tree(files.decode())


def _answer(bench: Workbench, tree: Tree, canary: Canary) -> str:
    ids = prompt_ids(canary.asked, bench.base.tokenizer, plain=bool(canary.text))
    return complete(bench, tree, torch.tensor(ids), canary.tokens)


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(measure(json.load(sys.stdin))))
    except MeadowError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
