"""Measure an exported adapter with plain peft + transformers: no bank, no trainer, no coordinator.

`python -m meadow.simulation.read_back RUN` prints {"loss": ...}: the mean over response tokens on
the union of the held-out rows that the run's run.toml names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ..client.data import silos_of
from ..client.encode import encode
from ..config import load
from ..nano import FOLDER
from ..peft_adapters.base_model import DTYPES


def loss_with_peft(run: Path) -> float:
    """The held-out loss of `run`/adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = load(run / "run.toml")
    name = str(FOLDER) if config.model.base == "nano" else config.model.base
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[config.model.dtype])
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    total, tokens = 0.0, 0
    for silo in silos_of(config):
        for example in encode(silo.held_out, tokenizer, config.data.max_length).examples:
            count = int((example.labels[1:] != -100).sum())
            with torch.no_grad():
                loss = model(input_ids=example.ids[None], labels=example.labels[None]).loss
            total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"loss": loss_with_peft(Path(sys.argv[1]))}) + "\n")
