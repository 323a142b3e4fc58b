"""What a coordinator asks for, checked against the terms that were approved before anything is
done with it."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FormatError
from ..strategies.base import Json, Turn
from ..strategies.messages import turn_from_json, unpack_update
from ..terms import Terms

_LARGEST = 2**53
_COUNTS = ("round", "rounds", "seed", "steps", "total_steps", "joined")


def read_turn(payload: bytes, terms: Terms, name: str, training: bool) -> Turn:
    """Whose turn a message is and for what.

    Raises FormatError for a message of another format, run or configuration, for another
    participant, or for work that the terms do not have.
    """
    _, header = unpack_update(payload)
    for key, expected in (("run", terms.run), ("config", terms.config_digest)):
        found = header.get(key)
        if found != expected:
            text = f"the message has {key} {str(found)[:64]!r}, approved is {expected!r}"
            raise FormatError(text, "the participant has to approve a change of terms")
    turn = _turn(header)
    if turn.client != name:
        raise FormatError(f"{name} received a turn of {turn.client[:64]!r}")
    _compare(turn, terms, training)
    return turn


def _turn(header: Mapping[str, Json]) -> Turn:
    """The turn, its types checked: JSON holds anything."""
    turn = turn_from_json(header.get("turn"))
    counts = [getattr(turn, name) for name in _COUNTS]
    if not all(type(count) is int and 0 <= count < _LARGEST for count in counts):
        raise FormatError("the message's turn has a number that cannot be true")
    if not all(isinstance(person, str) for person in (turn.client, *turn.cohort)):
        raise FormatError("the message's turn has a name that is no text")
    return turn


def _compare(turn: Turn, terms: Terms, training: bool) -> None:
    rounds, clients = terms.config.rounds, terms.config.clients
    approved = {"rounds": rounds.count, "seed": rounds.seed, "steps": clients.steps}
    for key, expected in approved.items():
        if getattr(turn, key) != expected:
            raise FormatError(f"the message has {key} {getattr(turn, key)}, approved is {expected}")
    if not (1 if training else 0) <= turn.round <= rounds.count:
        raise FormatError(f"there is no round {turn.round} in a run of {rounds.count}")
    if training and turn.client not in turn.cohort:
        raise FormatError(f"{turn.client} is not in the cohort of round {turn.round}")
