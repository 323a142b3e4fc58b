"""The baseline of `meadow bench deploy`: LoRA fine-tuning as Flower's own examples do it.

A ClientApp that, as FlowerTune's, loads tokenizer and model for every message, and FedAvg over
PEFT's weights.  It imports nothing of meadow: the benchmark copies this file into a Flower app of
its own and runs that with Flower's programs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

client = ClientApp()
server = ServerApp()


def load_model(settings: Any) -> Any:
    """The base with a fresh LoRA adapter."""
    base = AutoModelForCausalLM.from_pretrained(str(settings["model"]), dtype=torch.float32)
    lora = LoraConfig(
        r=int(settings["rank"]),
        lora_alpha=float(settings["alpha"]),
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def load_batch(settings: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """All training rows as one padded batch, with the loss on the response."""
    length, ids, labels = int(settings["max-length"]), [], []
    for line in Path(str(settings["rows"])).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            prompt = [tokenizer.bos_token_id]
            prompt += tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
            answer = answer + [tokenizer.eos_token_id]
            ids.append((prompt + answer)[:length])
            labels.append(([-100] * len(prompt) + answer)[:length])
    longest = max(len(row) for row in ids)
    return {
        "input_ids": _padded(ids, longest, 0),
        "attention_mask": _padded([[1] * len(row) for row in ids], longest, 0),
        "labels": _padded(labels, longest, -100),
    }


def _padded(rows: list[list[int]], length: int, filler: int) -> torch.Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def take_step(model: Any, batch: dict[str, torch.Tensor], rate: float) -> float:
    """One optimiser step over the batch; its loss."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, weight_decay=0.0)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(moving, 1.0)
    optimizer.step()
    return float(loss.detach())


@client.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    settings, begun = context.run_config, time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(str(settings["model"]))
    model = load_model(settings)
    batch = load_batch(settings, tokenizer)
    loaded = time.perf_counter()
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    loss = take_step(model, batch, float(settings["rate"]))
    trained = ArrayRecord(get_peft_model_state_dict(model))
    figures = MetricRecord(
        {
            "num-examples": len(batch["input_ids"]),
            "loss": loss,
            "loading": loaded - begun,
            "work": time.perf_counter() - loaded,
        }
    )
    return Message(RecordDict({"arrays": trained, "metrics": figures}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    initial = ArrayRecord(get_peft_model_state_dict(load_model(settings)))
    ended: list[float] = []

    def note(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Where an app would measure or save the model, as FlowerTune's does."""
        ended.append(time.time())
        return None

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(settings["rounds"]),
        train_config=ConfigRecord(),
        evaluate_fn=note,
    )
    told = {str(number): dict(m) for number, m in result.train_metrics_clientapp.items()}
    draft = Path(f"{settings['report']}.draft")
    draft.write_text(json.dumps({"ended": ended, "metrics": told}), encoding="utf-8")
    draft.replace(str(settings["report"]))
