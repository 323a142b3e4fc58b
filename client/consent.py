"""What a run would do on a participant's machine: found out, and put into words for a person,
before anything is agreed to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..display import bytes_text
from ..errors import FormatError, ModelError
from ..peft_adapters.blueprint import Blueprint, open_blueprint
from ..strategies.base import Strategy
from ..strategies.registry import strategy_of
from ..strategies.transforms import make_transforms
from ..terms import Terms
from .data import Silo, silo_of
from .message_sizes import measured_bytes
from .policy import Policy
from .sources import read_rows

_ROUNDS = 2  # some strategies send different things in turn


@dataclass(frozen=True)
class Offer:
    """One run, as it would be for one participant."""

    terms: Terms
    rules: Policy
    strategy: Strategy
    silo: Silo
    up: tuple[int, int]
    """Bytes that leave in a round, the least and the most."""

    @classmethod
    def look(cls, terms: Terms, rules: Policy, name: str) -> Offer:
        """Read base and text, and see that the participant's rules allow this run.

        Raises PolicyError where they do not, ModelError, FormatError or DataError where base or
        text is missing or cannot be used.
        """
        rules.approving(terms).check_terms(terms)
        data, clients = terms.config.data, terms.config.clients
        rows = read_rows(rules.data, data.chunk)
        silo = silo_of(name, rows, data.train_rows, data.held_out_rows)
        base = local_base(terms, rules.base)
        strategy = strategy_of(terms.config, base.layers, base.digest)
        transforms = make_transforms(clients.clip_update, clients.wire)
        up, _ = measured_bytes(strategy, 1, _ROUNDS, clients.steps, transforms)
        return cls(terms, rules, strategy, silo, (min(up), max(up)))

    def lines(self) -> Iterator[str]:
        """For a person to read before it happens."""
        terms, config, silo = self.terms, self.terms.config, self.silo
        yield f"run            {terms.run[:16]} of coordinator key {terms.coordinator[:16]}"
        yield f"base model     {config.model.base} (digest {terms.base_digest[:16]})"
        yield f"text           {', '.join(self.rules.data)}: it stays on this machine"
        yield f"               {len(silo.train)} rows to train on, {len(silo.held_out)} held out"
        yield (
            f"training       {config.rounds.count} rounds of {config.clients.steps} steps,"
            f" {config.clients.batch} rows each, strategy {self.strategy.name}:"
            f" {self.strategy.summary}"
        )
        for what in self._leaving():
            yield f"leaves         {what}"
        yield "never leaves   text, tokens, the base model, optimiser state"
        yield "privacy        the coordinator sees your update as it is; no noise is added"

    def _leaving(self) -> Iterator[str]:
        """What is sent in each round."""
        least, most = self.up
        size = bytes_text(most) if least == most else f"{bytes_text(least)} to {bytes_text(most)}"
        count = self.terms.config.rounds.count
        whole = f"{size} a round, {bytes_text(most * count)} in all at most"
        clip = self.terms.config.clients.clip_update
        if self.strategy.integers:
            yield f"a byte for each zeroth-order step, or the integers of a small core: {whole}"
        else:
            bound = f", its norm at most {clip:g}" if clip else ""
            yield f"an update of the adapter's weights{bound}: {whole}"
        yield "the training loss, the held-out loss, and how many rows and tokens they are of"


def local_base(terms: Terms, base: str) -> Blueprint:
    """The base model on this machine, which has to be the run's.

    Raises ModelError where there is none, FormatError where it is another.
    """
    model = terms.config.model
    name = base or model.base
    try:
        found = open_blueprint(terms.config.replace(model={"base": name}).model)
    except ModelError as error:
        raise ModelError(error.message, "name its folder on this machine with --base") from error
    if found.digest != terms.base_digest:
        raise FormatError(
            f"the base model {name} is another than the run's", "name the right one with --base"
        )
    return found
