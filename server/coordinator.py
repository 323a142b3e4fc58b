"""The coordinator: the schedule "rounds" over any strategy, every step of it in the journal.

A round samples a cohort, asks each member for its work, keeps every answer durably before it
counts, and closes when all have answered or the deadline has passed with a quorum.  Updates are
folded in the cohort's order, not in that of their arrival, so a resumed run equals an
uninterrupted one bit for bit.  Knows nothing of Flower: `Peers` are whoever can be asked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

from ..config import Config
from ..errors import FormatError, QuorumError, UpdateError
from ..events import Event, Observer
from ..journal import Journal
from ..one_line import one_line
from ..strategies.base import Measured, State, Strategy, Turn, Update
from ..strategies.messages import (
    INTEGERS,
    SENT,
    check_contribution,
    pack_state,
    pack_update,
    turn_to_json,
    unpack_state,
    unpack_update,
)
from ..strategies.staleness import patience_of
from ..strategies.transforms import Transform, to_server
from ..wire import require_finite
from .late_answers import Late, LateAnswers

KEPT_ROUNDS = 2  # payloads and states of older rounds are deleted


class Refusal(str):
    """Why a peer did not answer a request: its error, in one line, whatever it sent."""

    def __new__(cls, reason: str) -> Self:
        return super().__new__(cls, one_line(reason))


class Peers(Protocol):
    """Who can be asked.  `together` splits a cohort into the groups that compute as one."""

    def names(self) -> list[str]: ...

    def together(self, cohort: Sequence[str]) -> list[list[str]]: ...

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
    ) -> Iterator[tuple[str, bytes | Refusal | Late]]:
        """Answers as they arrive; ends when all are in or the deadline has passed.

        What came too late for an earlier question comes as well, with the round `number` of that.
        """


def sample(names: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """A cohort of ceil(fraction * n) names, the same on any machine."""

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"cohort/{seed}/{round}/{name}".encode()).digest()

    size = math.ceil(fraction * len(names) - 1e-9)
    return sorted(sorted(names, key=rank)[: max(1, size)])


class Coordinator:
    """Runs a strategy for `config.rounds.count` rounds, from wherever the journal stands."""

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        journal: Journal,
        peers: Peers,
        transforms: Sequence[Transform] = (),
        observer: Observer = lambda event: None,
        closed: Callable[[int, State], None] = lambda number, state: None,
        collected: Callable[[], None] = lambda: None,
    ) -> None:
        """`closed` is told the number and the state of each round once it is in the journal;
        `collected` is called when nobody is waited for any more and nothing is combined yet."""
        self.config, self.strategy, self.journal, self.peers = config, strategy, journal, peers
        self.transforms, self.observer = transforms, observer
        self.closed, self.collected = closed, collected
        self._late = LateAnswers(config, strategy, journal, transforms, observer, self.turn)
        self._header = {"run": journal.run_id, "config": config.shared().digest()}
        self.state = self._resume()

    def _resume(self) -> State:
        last = self.journal.last()
        if last is not None:
            return unpack_state(last[1])
        state = self.strategy.init(self.config.rounds.seed)
        self.state = state
        self.journal.close_round(0, pack_state(state), {"round": 0, **self.measure(0)})
        return state

    @property
    def rounds_done(self) -> int:
        last = self.journal.last()
        return 0 if last is None else last[0]

    def run(self) -> State:
        """All rounds that are left.  Raises QuorumError where a round cannot close."""
        for number in range(self.rounds_done + 1, self.config.rounds.count + 1):
            self.round(number)
        return self.state

    def turn(self, number: int, cohort: Sequence[str] = (), client: str = "") -> Turn:
        rounds, clients = self.config.rounds, self.config.clients
        total = math.ceil(rounds.count * rounds.fraction) * clients.steps
        joined = self._joined().get(client, number) if client else 1
        return Turn(
            number, rounds.count, rounds.seed, clients.steps, total, client, tuple(cohort), joined
        )

    def _joined(self) -> dict[str, int]:
        return dict(self.journal.get("joined") or {})

    def _enrol(self, number: int) -> list[str]:
        """The names that can be asked; a name never seen before joins in this round."""
        names, joined = self.peers.names(), self._joined()
        new = {name: number for name in names if name not in joined}
        if new:
            self.journal.note("joined", {**joined, **new})
        return names

    def _sample(self, number: int) -> list[str]:
        rounds = self.config.rounds
        share = min(1.0, rounds.fraction * (1 + rounds.spare))
        return sample(self._enrol(number), share, rounds.seed, number)

    def _wanted(self, cohort: Sequence[str]) -> int:
        """How many of a cohort a round waits for: all but those that were asked to spare."""
        return math.ceil(len(cohort) / (1 + self.config.rounds.spare) - 1e-9)

    def recast(self) -> None:
        """Ask others in the open round, beside those who have answered: its cohort is who can be
        asked now.  For a round that found no quorum."""
        opened = self.journal.current()
        if opened is None:
            return
        number = opened.number
        answered = set(self.journal.contributions(number))
        self.journal.recast(number, sorted(answered.union(self._sample(number))))

    def round(self, number: int) -> None:
        """One round, or the rest of it."""
        rounds = self.config.rounds
        opened = self.journal.current()
        if opened is None:
            cohort = self._sample(number)
            self.journal.open_round(number, cohort)
        else:
            cohort = list(opened.cohort)
        self.observer(Event("round_opened", number, {"cohort": cohort, "rounds": rounds.count}))
        sent = self.strategy.broadcast(self.state, self.turn(number, cohort))
        bytes_down = self._collect(number, cohort, sent)
        self.collected()
        total, figures = self._combine(number, cohort, sent)
        if total.weight > 0:
            self._step(total, self.turn(number, cohort))
            figures |= self.state.data
        measured = self._evaluate(number, figures["missing"])
        metrics = {"round": number, "bytes_down": bytes_down, **figures, **measured}
        late = figures.get("late", ())
        self.journal.close_round(number, pack_state(self.state), metrics, late)
        self.journal.prune(max(KEPT_ROUNDS, 1 + patience_of(self.strategy)))
        self.observer(Event("round_closed", number, metrics))
        self.closed(number, self.state)

    def _step(self, total: Update, turn: Turn) -> None:
        """The next state; finite updates whose combination is not leave the state as it was."""
        try:
            state = self.strategy.step(self.state, total, turn)
            require_finite(state.tensors, "the combination of all")
        except UpdateError as error:
            self._notice(turn.round, f"round {turn.round} changes nothing: {error}")
            return
        self.state = state

    def _notice(self, number: int, text: str) -> None:
        self.observer(Event("notice", number, {"text": text}))

    def _collect(self, number: int, cohort: Sequence[str], sent: Update) -> int:
        """Ask whoever has not answered yet; the bytes of what was sent out."""
        answered = {*self.journal.contributions(number), *self.journal.refusals(number)}
        groups = self.peers.together(cohort)
        asked = [name for group in groups if not answered.issuperset(group) for name in group]
        sizes: dict[str, int] = {}

        def payload(name: str) -> bytes:
            data = self._message(sent, self.turn(number, cohort, name))
            sizes[name] = len(data)
            return data

        missing = self._wanted(cohort) - len(self.journal.contributions(number))
        replies = self._ask("train", asked, payload, number)
        for name, reply in replies if missing > 0 else ():
            if name not in answered:
                missing -= self._receive(number, name, reply, sent, cohort)
            if missing <= 0 and self.config.rounds.spare:
                break  # the slowest are too late
        return sum(sizes[name] if name in sizes else len(payload(name)) for name in cohort)

    def _ask(
        self, verb: str, names: Sequence[str], payload: Callable[[str], bytes], number: int
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        """Answers that come in time; those that do not are put aside, or dropped by name."""
        deadline = self.config.rounds.deadline_seconds
        for name, reply in self.peers.ask(verb, names, payload, deadline, number):
            if isinstance(reply, Late):
                self._late.take(name, reply)
            else:
                yield name, reply

    def _message(self, sent: Update, turn: Turn) -> bytes:
        """What a participant is sent: whose run and turn it is, and the broadcast."""
        return pack_update(sent, turn=turn_to_json(turn), **self._header)

    def _receive(
        self, number: int, name: str, reply: bytes | Refusal, sent: Update, cohort: Sequence[str]
    ) -> bool:
        """Keep one answer durably, or refuse it by name; whether it is a new contribution."""
        try:
            if isinstance(reply, Refusal):
                raise UpdateError(str(reply))
            turn = self.turn(number, cohort, name)
            types = INTEGERS if self.strategy.integers else SENT
            update = check_contribution(reply, self.strategy.template(sent, turn), name, types)
            self.strategy.validate(update, turn)
            if not self.journal.receive(number, name, reply):
                return False  # the same bytes once more
        except (UpdateError, FormatError) as error:
            self.journal.refuse(number, name, str(error))
            self.observer(Event("refused", number, {"client": name, "reason": str(error)}))
            return False
        told = {"client": name, "bytes": len(reply), **_figures(update)}
        self.observer(Event("contribution", number, told))
        return True

    def _combine(
        self, number: int, cohort: Sequence[str], sent: Update
    ) -> tuple[Update, dict[str, Any]]:
        """Fold the journaled contributions in the cohort's order."""
        digests = self.journal.contributions(number)
        refusals = self.journal.refusals(number)
        least = max(1, math.ceil(self.config.rounds.quorum * self._wanted(cohort) - 1e-9))
        if len(digests) < least:
            self.journal.forgive(number)  # a second try of the run is a second try for them
            raise QuorumError(
                f"round {number} has {len(digests)} of {len(cohort)} contributions, quorum {least}",
                _absences(cohort, digests, refusals),
            )
        turn = self.turn(number, cohort)
        reducer, losses, bytes_up = self.strategy.reducer(turn), {}, 0
        for name in cohort:
            if name in digests:
                data = self.journal.payload(digests[name])
                update = replace(unpack_update(data)[0], sender=name)
                reducer.fold(to_server(self.transforms, update, sent, turn))
                losses[name] = _figures(update).get("loss")
                bytes_up += len(data)
        late, more = self._late.fold(reducer, number, sent)
        total = reducer.total()
        figures = self.strategy.report(total, turn) if total.weight > 0 else {}
        figures = {**figures, **total.notes}
        missing = [name for name in cohort if name not in digests and name not in refusals]
        return total, {
            "bytes_up": bytes_up + more,
            "train_loss": losses,
            "contributions": len(digests),
            "refused": refusals,
            "missing": missing,
            **({"late": late} if late else {}),
            **figures,
        }

    def _evaluate(self, number: int, missing: Sequence[str]) -> dict[str, Any]:
        """Held-out losses with the new state: each participant's, and the mean over all tokens.

        Who is missing from the round is asked nothing more in it, and costs one deadline, not two.
        """
        rounds = self.config.rounds
        if number % rounds.evaluate_every and number != rounds.count:
            return {}
        return self.measure(number, missing)

    def measure(self, number: int, without: Sequence[str] = ()) -> dict[str, Any]:
        """Ask all participants to measure what they would use after round `number`."""
        sent = self.strategy.broadcast(self.state, self.turn(number))
        answers: dict[str, Measured] = {}

        def payload(name: str) -> bytes:
            return self._message(sent, self.turn(number, (), name))

        asked = [name for name in self.peers.names() if name not in without]
        for name, reply in self._ask("evaluate", asked, payload, number):
            try:
                answers[name] = _measured(reply, name)
            except (UpdateError, FormatError) as error:
                self._notice(number, f"{name} is not in the held-out loss: {error}")
        kept = [(name, answers[name]) for name in sorted(answers) if answers[name].tokens]
        tokens = sum(answer.tokens for _, answer in kept)
        if not tokens:
            return {}
        mean = sum(answer.loss * answer.tokens for _, answer in kept) / tokens
        return {"loss": mean, "losses": {name: answer.loss for name, answer in kept}}


def _figures(update: Update) -> dict[str, float]:
    """What a client says of its training, as far as it is numbers."""
    told = {key: update.notes.get(key) for key in ("loss", "examples", "tokens")}
    return {key: value for key, value in told.items() if isinstance(value, int | float)}


def _measured(reply: bytes | Refusal, who: str) -> Measured:
    """A client's held-out loss.  Raises UpdateError or FormatError where it is not one."""
    if isinstance(reply, Refusal):
        raise UpdateError(str(reply))
    notes = unpack_update(reply)[0].notes
    loss, tokens = notes.get("loss"), notes.get("tokens")
    if not (
        isinstance(loss, int | float) and abs(loss) < 1e300 and type(tokens) is int and tokens >= 0
    ):
        raise UpdateError(f"{who} answered without a loss and its number of tokens")
    return Measured(float(loss), tokens)


def _absences(
    cohort: Sequence[str], arrived: Mapping[str, str], refusals: Mapping[str, str], most: int = 8
) -> str:
    """Who of a cohort did not contribute and why, in one line."""
    reasons = [
        f"{name}: {refusals.get(name, 'no answer before the deadline')}"
        for name in cohort
        if name not in arrived
    ]
    more = [f"and {len(reasons) - most} more"] if len(reasons) > most else []
    return "; ".join(reasons[:most] + more)
