"""What a machine loads once to work on a run: base model, bank, and participants' encoded text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import Config
from ..errors import ConfigError
from ..peft_adapters.adapter_reader import Adapter
from ..peft_adapters.bank import Bank
from ..peft_adapters.base_model import Base, load_base, sites
from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.layout import FACTORS, Site, Tree
from .data import Silo
from .encode import encode
from .task import Participant


@dataclass(frozen=True)
class Workbench:
    """A base model with the bank in place of its adapted layers."""

    base: Base
    bank: Bank
    blueprint: Blueprint  # of the base before the bank's layers moved in

    @property
    def layers(self) -> tuple[Site, ...]:
        return self.blueprint.layers

    @property
    def pad(self) -> int:
        token = self.base.tokenizer.pad_token_id
        return 0 if token is None else int(token)

    def blank(self, rank: int = 1) -> Tree:
        """An adapter of all layers that changes nothing."""
        return {
            f"{site.name}.{factor}": torch.zeros(site.shape(factor, rank))
            for site in self.layers
            for factor in FACTORS
        }

    def tree(self, adapter: Adapter) -> Tree:
        """A PEFT adapter, which may leave layers out, as the bank takes it: at its own scaling."""
        share = adapter.scaling / self.bank.scaling
        return self.blank(adapter.rank) | {
            name: tensor * share if name.endswith("lora_B") else tensor
            for name, tensor in adapter.tree.items()
        }

    def encode(self, silo: Silo, config: Config) -> tuple[Participant, int]:
        """A participant's text as tokens, and how many of its rows were too long."""
        train = encode(silo.train, self.base.tokenizer, config.data.max_length)
        held_out = encode(silo.held_out, self.base.tokenizer, config.data.max_length)
        seed = config.rounds.seed
        person = Participant(silo.client, train.examples, held_out.examples, seed)
        return person, train.truncated + held_out.truncated


def open_workbench(config: Config) -> Workbench:
    """Load the base that `config` names, and settle torch's threads.

    Raises ModelError or ConfigError.
    """
    if config.simulation.threads:
        torch.set_num_threads(config.simulation.threads)
    model = config.model
    base = load_base(model.base, dtype=model.dtype, quantize=model.quantize, device=model.device)
    layers = sites(base.model, model.targets)
    check_length(config.data.max_length, base)
    modules = tuple(name for name, _ in base.model.named_modules())
    blueprint = Blueprint(model.base, base.digest, tuple(layers), modules)
    return Workbench(base, Bank(base.model, layers, config.scaling), blueprint)


def check_length(max_length: int, base: Base) -> None:
    """Refuse rows longer than the model's context."""
    context = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise ConfigError(
            f"[data] max_length = {max_length} is more than the context of {base.name}",
            f"at most {context}",
        )
