"""Pre-train nano from the standard library's own text: `python -m meadow.simulation.pretrain_nano`.

One seed and one command give the weights in `meadow/nano/base`; the loss that they reached is
written beside them in `training.json`.  Hidden matrices are trained by Muon (orthogonalised
momentum, Jordan et al. 2024), embeddings and norms by AdamW.  A run that was stopped continues
from its last checkpoint (`--checkpoint FILE`) with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..nano import FOLDER
from ..nano.corpus import pretraining_files

log = logging.getLogger(__name__)

VOCABULARY = 2048
CONTEXT = 256
TEST_SHARE = 0.35  # of every batch; test code is repetitive, so it counts for less than its size
SPECIAL = ("<pad>", "<s>", "</s>")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
    )


def build_model() -> LlamaForCausalLM:
    """3.7 M parameters: 7.5 MB in bf16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=576,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            initializer_range=0.02,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts in one row of token ids, each between <s> and </s>."""
    pieces: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        pieces += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor(pieces)


def windows(stream: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Windows of CONTEXT + 1 tokens without replacement; a new offset and order each epoch."""
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        count = (len(stream) - offset - 1) // CONTEXT
        for index in torch.randperm(count, generator=generator).tolist():
            start = offset + index * CONTEXT
            yield stream[start : start + CONTEXT + 1]


def batch_of(sources: list[tuple[Iterator[torch.Tensor], int]]) -> torch.Tensor:
    return torch.stack([next(source) for source, rows in sources for _ in range(rows)])


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    return loss


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, rows: int = 128) -> float:
    """Mean loss over evenly spaced windows of a held-out stream."""
    model.eval()
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, rows).long().tolist()
    batches = [
        torch.stack([stream[s : s + CONTEXT + 1] for s in starts[i : i + 16]])
        for i in range(0, rows, 16)
    ]
    losses = [float(loss_of(model, batch)) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """Warm up, stay, then fall linearly to 2 % (a trapezoid), as a factor of the peak rate."""
    return min((step + 1) / warmup, 1.0, max(0.02, (steps - step) / (decay * steps)))


def orthogonalize(momenta: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a stack (k, m, n), by quintic Newton-Schulz."""
    wide = momenta.shape[-2] <= momenta.shape[-1]
    x = momenta if wide else momenta.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x if wide else x.mT
    return result


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices, in float32 (torch's own computes in bf16,
    which a CPU emulates: 6 s a step here against 0.3 s).  Equal shapes share one iteration."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                looked_ahead = torch.stack(
                    [self._momentum(p, group["momentum"]) for p in parameters]
                )
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, orthogonalize(looked_ahead), strict=True):
                    parameter.mul_(1 - 0.1 * group["lr"]).sub_(update, alpha=scale)

    def _momentum(self, parameter: torch.nn.Parameter, beta: float) -> torch.Tensor:
        assert parameter.grad is not None
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(buffer, beta)


def optimizers_of(
    model: LlamaForCausalLM, muon: float, adamw: float
) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(hidden, lr=muon),
        torch.optim.AdamW(others, lr=adamw, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Checkpoint:
    """Weights, optimiser state and history of a stopped run, in one safetensors file."""

    def __init__(
        self,
        path: Path | None,
        model: LlamaForCausalLM,
        optimizers: list[torch.optim.Optimizer],
        settings: str,
    ) -> None:
        self.path, self.model, self.optimizers = path, model, optimizers
        self.settings = settings  # of another run: refused, because the numbers would differ

    def save(self, step: int, running: float, history: list[dict[str, float]]) -> None:
        if self.path is None:
            return
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{index}.{key}.{name}": value for name, value in state.items()}
        progress = {"step": step, "running": running, "history": history}
        metadata = {"settings": self.settings, "progress": json.dumps(progress)}
        temporary = self.path.with_suffix(".tmp")
        save_file({k: v.clone() for k, v in tensors.items()}, temporary, metadata)
        temporary.replace(self.path)

    def load(self) -> tuple[int, float, list[dict[str, float]]]:
        """Step to go on with, running loss and history; those of a fresh run if there is none."""
        if self.path is None or not self.path.exists():
            return 0, math.nan, []
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            if metadata["settings"] != self.settings:
                raise SystemExit(f"{self.path} belongs to a run of other settings: remove it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        states: list[dict[int, dict[str, torch.Tensor]]] = [
            defaultdict(dict) for _ in self.optimizers
        ]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        for path, value in tensors.items():
            index, key, name = path.split(".")
            states[int(index)][int(key)][name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
        progress = json.loads(metadata["progress"])
        return progress["step"], progress["running"], progress["history"]


def train(
    model: LlamaForCausalLM,
    sources: list[tuple[Iterator[torch.Tensor], int]],
    steps: int,
    optimizers: list[torch.optim.Optimizer],
    held: torch.Tensor,
    checkpoint: Checkpoint,
) -> list[dict[str, float]]:
    """Losses by step; the model is trained in place."""
    compiled = torch.compile(model)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    first, running, history = checkpoint.load()
    began = time.monotonic()
    for _ in range(first):
        batch_of(sources)
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, steps)
        loss = loss_of(compiled, batch_of(sources))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            history.append({"step": step + 1, "train": running, "held_out": evaluate(model, held)})
            log.info("%s, %.0f s", history[-1], time.monotonic() - began)
            checkpoint.save(step + 1, running, history)
    return history


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    report: dict[str, object],
) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def texts_of() -> tuple[list[str], list[str], list[str]]:
    """Code and manual, tests, and every fiftieth file (without tests) held out."""
    files = list(pretraining_files())
    held_names = {name for index, (name, _, _) in enumerate(files) if index % 50 == 25}
    code = [text for name, text, test in files if not test and name not in held_names]
    tests = [text for name, text, test in files if test and name not in held_names]
    held = [text for name, text, test in files if not test and name in held_names]
    return code, tests, held


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--checkpoint", type=Path, help="written every 200 steps; continued from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon", type=float, default=4e-3)
    parser.add_argument("--adamw", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    settings = " ".join(
        f"--{key} {value}"
        for key, value in vars(options).items()
        if key not in ("out", "checkpoint")
    )
    texts = texts_of()
    tokenizer = train_tokenizer(texts[0])
    code, tests, held = (tokenize(part, tokenizer) for part in texts)
    log.info("tokens: %s code, %s tests, %s held out", len(code), len(tests), len(held))
    generator = torch.Generator().manual_seed(options.seed)
    test_rows = round(TEST_SHARE * options.batch)
    sources = [
        (windows(code, generator), options.batch - test_rows),
        (windows(tests, generator), test_rows),
    ]
    model = build_model()
    optimizers = optimizers_of(model, options.muon, options.adamw)
    checkpoint = Checkpoint(options.checkpoint, model, optimizers, settings)
    report = {
        "command": f"python -m meadow.simulation.pretrain_nano {settings}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": options.steps * options.batch * CONTEXT,
        "characters_per_token": sum(map(len, texts[2])) / len(held),
        "history": train(model, sources, options.steps, optimizers, held, checkpoint),
    }
    save(model, tokenizer, options.out, report)


if __name__ == "__main__":
    main()
