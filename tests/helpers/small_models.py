"""Models of a few layers with random weights, the same ones each time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def lively_llama(layers: int) -> LlamaForCausalLM:
    """Its weights are larger than at initialisation, so that losses differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


class Net(nn.Module):
    """Two linear layers, one of them nested, with a bend between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.deep = nn.ModuleDict({"second": nn.Linear(6, 3, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.deep["second"](torch.tanh(self.first(x)))
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)
