"""Strategies by name: all of them are listed, and a wrong word gets the nearest right one."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import pytest
from toy import SITES

from meadow import strategies
from meadow.errors import ConfigError
from meadow.strategies.base import Strategy
from meadow.strategies.registry import STRATEGIES, make, options_of


def test_every_strategy_in_the_folder_is_registered() -> None:
    found: set[type[Strategy]] = set()
    for module in pkgutil.iter_modules(strategies.__path__):
        names = vars(importlib.import_module(f"meadow.strategies.{module.name}"))
        found |= {
            kind
            for kind in names.values()
            if isinstance(kind, type) and issubclass(kind, Strategy) and "name" in vars(kind)
        }
    assert found == set(STRATEGIES.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_says_what_it_is(name: str) -> None:
    kind = STRATEGIES[name]
    assert kind.name == name and kind.paper.startswith("arXiv ")
    assert kind.summary and "\n" not in kind.summary
    assert kind.__module__.rpartition(".")[2] == name
    for part in options_of(kind):
        assert part.metadata["about"] and part.name not in ("sites", "rank")


@pytest.mark.parametrize("name", STRATEGIES)
def test_defaults_written_out_are_the_defaults(name: str) -> None:
    plain = make(name, {}, SITES, 2)
    values = {part.name: getattr(plain, part.name) for part in options_of(STRATEGIES[name])}
    assert make(name, values, SITES, 2) == plain
    assert plain.rank == 2 and plain.sites == SITES and dataclasses.is_dataclass(plain)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fedavg", {}, "unknown strategy 'fedavg' (did you mean 'fedavg_lora'?)"),
        ("dilocco", {}, "unknown strategy 'dilocco' (did you mean 'diloco'?)"),
        ("zzz", {}, f"unknown strategy 'zzz' (known: {', '.join(STRATEGIES)})"),
        ("fedavg_lora", {"refined": "none"},
         "strategy fedavg_lora has no option 'refined' (did you mean 'refine'?)"),
        ("ffa_lora", {"refine": "none"}, "strategy ffa_lora has no option 'refine' (known: "),
        ("fedavg_lora", {"refine": "svd"},
         "[strategy] refine is 'svd' (one of 'none', 'product_svd', 'rotate')"),
        ("fedavg_lora", {"server_lr": "fast"}, "[strategy] server_lr is 'fast' (expected float)"),
        ("fedavg_lora", {"server_lr": True}, "[strategy] server_lr is True (expected float)"),
        ("fedavg_lora", {"server_lr": float("inf")},
         "[strategy] server_lr is inf (expected a finite number)"),
        ("fedavg_lora", {"proximal": -0.5}, "[strategy] proximal is -0.5 (at least 0)"),
        ("fedavg_lora", {"keep_optimizer": 1}, "[strategy] keep_optimizer is 1 (expected bool)"),
        ("fedavg_lora", {"ranks": [1]}, "[strategy] ranks is [1] (expected dict)"),
        ("flora", {"ranks": {"ada": 1.5}}, "[strategy] ranks.ada is 1.5 (expected int)"),
        ("diloco", {"rank": 4}, "strategy diloco has no option 'rank'"),
    ],
)  # fmt: skip
def test_wrong_words_and_values(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(name, options)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_whole_number_serves_as_a_float() -> None:
    strategy = make("diloco", {"outer_lr": 1})
    assert isinstance(strategy.outer_lr, float)  # type: ignore[attr-defined]
