"""What a machine loads once to work on a run: base model, bank, and participants' encoded text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..errors import ConfigError
from ..nano import FOLDER as NANO_FOLDER
from ..peft_adapters.bank import Bank
from ..peft_adapters.layout import Site, Tree
from ..peft_adapters.peft_format import SERVABLE_RANKS, largest_rank, save_adapter
from ..store import Disk
from .data import Silo
from .encode import encode
from .model import NANO, Base, load_base, sites
from .task import Participant


@dataclass(frozen=True)
class Workbench:
    """A base model with the bank in place of its adapted layers."""

    base: Base
    bank: Bank
    layers: tuple[Site, ...]
    modules: tuple[str, ...]  # all module names of the base, before the bank's layers moved in

    @property
    def pad(self) -> int:
        token = self.base.tokenizer.pad_token_id
        return 0 if token is None else int(token)

    def encode(self, silo: Silo, config: Config) -> tuple[Participant, int]:
        """A participant's text as tokens, and how many of its rows were too long."""
        train = encode(silo.train, self.base.tokenizer, config.data.max_length)
        held_out = encode(silo.held_out, self.base.tokenizer, config.data.max_length)
        seed = config.rounds.seed
        person = Participant(silo.client, train.examples, held_out.examples, seed)
        return person, train.truncated + held_out.truncated

    def export(self, config: Config, tree: Tree, folder: Path, run_id: str, disk: Disk) -> None:
        """Write a LoRA adapter in PEFT's format."""
        save_adapter(
            folder,
            tree,
            scaling=config.scaling,
            base=str(NANO_FOLDER) if self.base.name == NANO else self.base.name,
            modules=self.modules,
            metadata={"base_digest": self.base.digest, "run": run_id},
            disk=disk,
        )


def open_workbench(config: Config) -> Workbench:
    """Load the base that `config` names, and settle torch's threads.

    Raises ModelError or ConfigError.
    """
    if config.simulation.threads:
        torch.set_num_threads(config.simulation.threads)
    model = config.model
    base = load_base(model.base, dtype=model.dtype, quantize=model.quantize, device=model.device)
    layers = sites(base.model, model.targets)
    if model.rank > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"[model] rank = {model.rank} cannot be exported", f"at most {SERVABLE_RANKS[-1]}"
        )
    check_length(config.data.max_length, base)
    modules = tuple(name for name, _ in base.model.named_modules())
    return Workbench(base, Bank(base.model, layers, config.scaling), tuple(layers), modules)


def check_length(max_length: int, base: Base) -> None:
    """Refuse rows longer than the model's context."""
    context = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise ConfigError(
            f"[data] max_length = {max_length} is more than the context of {base.name}",
            f"at most {context}",
        )


def check_exportable(rank: int, layers: Sequence[Site]) -> None:
    """Refuse, before the work, a rank whose adapter could not be written after it."""
    largest = largest_rank((site.rows, site.columns) for site in layers)
    if rank > largest:
        raise ConfigError(
            f"[model] rank = {rank} is larger than every adapted layer", f"at most {largest}"
        )
