"""A small llama and its bank for each test: a pytest plugin, used with local_trainings.py."""

from __future__ import annotations

import pytest
from local_trainings import SCALING
from small_models import lively_llama
from transformers import LlamaForCausalLM

from meadow.peft_adapters.bank import Bank
from meadow.peft_adapters.base_model import sites


@pytest.fixture
def model() -> LlamaForCausalLM:
    return lively_llama(2)


@pytest.fixture
def bank(model: LlamaForCausalLM) -> Bank:
    return Bank(model, sites(model, "all-linear"), SCALING)
