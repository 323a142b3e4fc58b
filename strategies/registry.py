"""All strategies by name; a new one is a file and a line here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from ..config import Config
from ..config_values import checked
from ..errors import ConfigError
from ..peft_adapters.layout import Site
from .base import Strategy
from .diloco import DiLoCo
from .fedavg_lora import FedAvgLora
from .fedex_lora import FedExLora
from .fedkseed import FedKSeed
from .fedsa_lora import FedSaLora
from .ffa_lora import FfaLora
from .flora import FLora
from .pool_lora import PoolLora
from .rolora import RoLora

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        FedAvgLora,
        FfaLora,
        RoLora,
        FLora,
        FedExLora,
        FedSaLora,
        DiLoCo,
        FedKSeed,
        PoolLora,
    )
}

_FRAME = tuple(part.name for part in dataclasses.fields(Strategy))  # known, not options


def options_of(kind: type[Strategy]) -> list[dataclasses.Field[Any]]:
    """The fields that run.toml may set."""
    return [part for part in dataclasses.fields(kind) if part.name not in _FRAME]


def make(
    name: str,
    options: Mapping[str, Any],
    sites: Sequence[Site] = (),
    rank: int = 8,
    scaling: float = 1.0,
    base_digest: str = "",
) -> Strategy:
    """A strategy with its options checked.  Raises ConfigError naming the nearest known word."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}", _nearest(name, list(STRATEGIES)))
    kind = STRATEGIES[name]
    hints = get_type_hints(kind)
    parts = {part.name: part for part in options_of(kind)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in parts:
            raise ConfigError(f"strategy {name} has no option {key!r}", _nearest(key, list(parts)))
        bounds = parts[key].metadata
        values[key] = checked(
            value, hints[key], f"[strategy] {key}", bounds["least"], bounds["most"]
        )
    values |= {"sites": tuple(sites), "rank": rank, "scaling": scaling, "base_digest": base_digest}
    strategy = kind(**values)
    strategy.check()
    return strategy


def strategy_of(config: Config, sites: Sequence[Site] = (), base_digest: str = "") -> Strategy:
    """The strategy that a run's settings name, over the layers of its base model."""
    chosen, model = config.strategy, config.model
    return make(chosen.name, chosen.options, sites, model.rank, config.scaling, base_digest)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
