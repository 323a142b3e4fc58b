"""Answers that come after their round has gone on without them: a later round counts them, for
less, where the strategy can; all others are dropped.  Either is told, by name.

An answer that comes while a round is open counts from the next one on, so that what a round is made
of is in the journal before anything is combined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..config import Config
from ..errors import FormatError, UpdateError
from ..events import Event, Observer
from ..journal import Journal
from ..strategies.base import Reducer, Strategy, Turn, Update
from ..strategies.messages import SENT, check_contribution, unpack_state, unpack_update
from ..strategies.staleness import Patient, patience_of
from ..strategies.transforms import Transform, to_server


@dataclass(frozen=True)
class Late:
    """An answer, or a refusal, for which nobody waits any more."""

    verb: str
    round: int
    answer: bytes | str


class LateAnswers:
    """One run's.  `turn` gives the turn of a round, its cohort and one of them."""

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        journal: Journal,
        transforms: Sequence[Transform],
        observer: Observer,
        turn: Callable[[int, Sequence[str], str], Turn],
    ) -> None:
        self._config, self._strategy, self._journal = config, strategy, journal
        self._transforms, self._observer, self._turn = transforms, observer, turn

    def take(self, name: str, late: Late) -> None:
        """Keep an answer that a later round may count, and drop any other.

        It is held to what it was asked for, as one in time is.
        """
        counts_in = self._next()
        told: dict[str, object] = {"client": name}
        try:
            if self._may_count(late, counts_in) and self._kept(name, late, counts_in):
                told["counts_in"] = counts_in
        except (UpdateError, FormatError) as error:
            self._observer(Event("refused", late.round, {**told, "reason": str(error)}))
            return
        self._observer(Event("late", late.round, told))

    def fold(
        self, reducer: Reducer, number: int, sent: Update
    ) -> tuple[list[tuple[int, str]], int]:
        """Add to a round what came late to earlier ones, the oldest first; (round, client) of each,
        and their bytes."""
        strategy, counted, size = self._strategy, [], 0
        if not isinstance(strategy, Patient):
            return [], 0
        for asked, name, digest in self._journal.late(number):
            data = self._journal.payload(digest)
            then, turn = self._sent(asked), self._turn(asked, self._journal.cohort(asked), name)
            update = replace(unpack_update(data)[0], sender=name)
            update = to_server(self._transforms, update, then, turn)
            reducer.fold(strategy.adopt(update, then, sent, number - asked))
            counted.append((asked, name))
            size += len(data)
        return counted, size

    def _next(self) -> int:
        """The round after the one that is open, or about to be."""
        opened, newest = self._journal.current(), self._journal.newest()
        return opened.number + 1 if opened is not None else (newest or 0) + 1

    def _may_count(self, late: Late, counts_in: int) -> bool:
        in_run = late.verb == "train" and counts_in <= self._config.rounds.count
        return in_run and 0 < counts_in - late.round <= patience_of(self._strategy)

    def _kept(self, name: str, late: Late, counts_in: int) -> bool:
        """Whether it is a contribution, and news."""
        if not isinstance(late.answer, bytes):
            return False
        turn = self._turn(late.round, self._journal.cohort(late.round), name)
        template = self._strategy.template(self._sent(late.round), turn)
        self._strategy.validate(check_contribution(late.answer, template, name, SENT), turn)
        return self._journal.keep_late(late.round, name, late.answer, counts_in)

    def _sent(self, number: int) -> Update:
        """What that round had sent."""
        state = unpack_state(self._journal.state(number - 1))
        turn = self._turn(number, self._journal.cohort(number), "")
        return self._strategy.broadcast(state, turn)
