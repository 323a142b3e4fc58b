"""What a peer's run.toml and its run's charter have to agree on, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..config import Config
from ..errors import ConfigError, ModelError
from ..peft_adapters.blueprint import check_exportable
from ..peft_adapters.pool import Pool
from ..strategies.charter import Charter, Member
from ..strategies.pool_strategy import PoolStrategy
from ..strategies.registry import make
from .workbench import Workbench

CHARTERED = ("epsilon", "scale", "cores", "unit")
"""The strategy's options that the charter fixes for all peers."""

_NEUTRAL = {
    "momentum": 0.0,
    "schedule": "constant",
    "importance": False,
    "combine": "mean",
    "adaptive_scale": False,
    "directions": 1,
    "gain": 0.0,
    "lr": PoolStrategy.lr,
}
_EVERYWHERE = ("0.0.0.0", "[::]")


def draft(config: Config, bench: Workbench, founders: Iterable[Member], run_id: str) -> Charter:
    """The charter of a new run as `config` describes it, not yet signed.

    Raises ConfigError for what peers cannot honour, or for a rate that the grid has no shift for.
    """
    terms = terms_of(config)
    check_exportable(config.model.rank, bench.layers)
    layers = tuple(sorted(bench.layers, key=lambda site: site.name))
    pool = Pool(run_id, bench.base.digest, layers, config.model.rank, terms.cores, terms.unit)
    ordered = tuple(sorted(founders, key=lambda member: member.peer))
    charter = Charter(pool, ordered, terms.epsilon, terms.scale)
    shift_for(config.peer.lr, charter, 1)
    return charter


def terms_of(config: Config) -> PoolStrategy:
    """The strategy's options, checked.  Raises ConfigError for what only a coordinator can do."""
    if config.strategy.name != "fedkseed":
        raise ConfigError(
            f"peers without a coordinator run fedkseed, not {config.strategy.name}",
            '[strategy] name = "fedkseed"',
        )
    options = {**config.strategy.options, "lr": config.peer.lr}
    strategy = make(config.strategy.name, options, (), config.model.rank)
    assert isinstance(strategy, PoolStrategy)
    for key, value in config.strategy.options.items():
        if key not in CHARTERED and value != _NEUTRAL[key]:
            raise ConfigError(
                f"[strategy] {key} = {value!r} needs a coordinator: peers add up bytes, no more",
                "set [peer] lr" if key == "lr" else f"leave it out, or {key} = {_NEUTRAL[key]!r}",
            )
    return strategy


def refuse_other_terms(config: Config, charter: Charter) -> None:
    """Raise ConfigError where run.toml asks for what the charter has otherwise."""
    terms, pool = terms_of(config), charter.pool
    fixed = {
        "[strategy] epsilon": (terms.epsilon, charter.epsilon_exponent),
        "[strategy] scale": (terms.scale, charter.gradient_exponent),
        "[strategy] cores": (terms.cores, pool.cores),
        "[strategy] unit": (terms.unit, pool.unit),
        "[model] rank": (config.model.rank, pool.rank),
    }
    for key, (mine, agreed) in fixed.items():
        if mine != agreed:
            raise ConfigError(
                f"{key} is {mine!r} here, and {agreed!r} in the charter",
                "take the run.toml that came with the charter",
            )


def refuse_other_base(charter: Charter, bench: Workbench) -> None:
    """Raise ModelError unless base and adapted layers are the charter's."""
    pool = charter.pool
    if pool.base_digest != bench.base.digest:
        raise ModelError(
            f"the run is about another base: its digest is {pool.base_digest[:16]}, that of"
            f" {bench.base.name} is {bench.base.digest[:16]}",
            "set [model] base to the one that the charter was made with",
        )
    if pool.sites != tuple(sorted(bench.layers, key=lambda site: site.name)):
        raise ModelError(
            "the run adapts other layers of this base", "set [model] targets as its founder did"
        )


def refuse_other_place(config: Config) -> None:
    """Raise ConfigError where others would be told an address at which nobody answers."""
    listen, address = config.peer.listen, config.peer.address
    if address and not listen:
        raise ConfigError(
            f"[peer] address = {address!r}, but nothing listens", "set [peer] listen, or no address"
        )
    if listen.rpartition(":")[0] in _EVERYWHERE and not address:
        raise ConfigError(
            f"[peer] listen = {listen!r} is no address that others can call",
            "set [peer] address to the host:port by which they reach this machine",
        )


def unscaled(config: Config, charter: Charter) -> Config:
    """`config` with updates scaled by 1: whoever has the same state writes the same adapter."""
    rank = charter.pool.rank
    return config.replace(model={"rank": rank, "alpha": float(rank)})


def shift_for(lr: float, charter: Charter, members: int) -> int:
    """The power of two that comes nearest to lr / sqrt(members), as a record's shift.

    Adding up what `members` measured at once multiplies the step; its noise grows with the root.
    The finest step stays at 0 however many there are.  Raises ConfigError for a rate that the
    charter's grid does not have for one peer alone.
    """
    fine = charter.gradient_exponent + charter.pool.unit
    alone = math.log2(lr) + fine
    if not 0 <= round(alone) <= charter.largest_shift:
        least, most = 2.0**-fine, 2.0 ** (charter.largest_shift - fine)
        raise ConfigError(
            f"[peer] lr = {lr:g} would need a shift of {round(alone)}, not 0 to"
            f" {charter.largest_shift}",
            f"between {least:.1e} and {most:.1e} here",
        )
    return max(0, round(alone - math.log2(max(1, members)) / 2))
