"""The participant's own rules, in `policy.toml`: what a coordinator may ask of this machine.

Nothing that comes over the network can change the file.  A request outside its rules is refused
with the reason before any work, and work that outgrows them is stopped between two steps.  The
dataclass is the reference: its defaults are the defaults, its metadata the comments in the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ..config_values import checked
from ..errors import ConfigError, IdentityError, PolicyError
from ..store import Disk, explained
from ..terms import Terms
from .home import read_text

if TYPE_CHECKING:  # torch stays out of commands that only read a policy
    from ..strategies.base import Turn

FORMAT = 1
MB = 1_000_000  # bytes

_PERIOD = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)")


def _key(default: Any, about: str, least: float | None = None) -> Any:
    metadata = {"about": about, "least": least}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Used:
    """What counts against the limits already, from the log of what left."""

    rounds_today: int = 0  # other rounds trained in the last 24 hours
    received: int = 0  # bytes of this round's messages before this one
    sent: int = 0  # bytes of this round's answers so far


@dataclass(frozen=True)
class Policy:
    """A participant's rules.  Limits of 0 and empty lists do not limit."""

    coordinator: str = _key("", "the coordinator's public key that was approved")
    terms: str = _key("", "digest of the run's terms that were approved")
    base: str = _key("", 'folder of the base model on this machine ("": as the terms name it)')
    base_digests: list[str] = _key([], "base models that may be trained ([]: the approved one)")
    data: list[str] = _key([], "text to train on: files, patterns or folders, relative to here")
    data_changes: Literal["refuse", "accept"] = _key(
        "refuse", "when that text changes during a run: refuse to go on, or accept it"
    )
    most_steps: int = _key(0, "largest number of training steps a round", 0)
    most_seconds: float = _key(0.0, "longest work for one request, stopped between steps", 0)
    most_memory_mb: int = _key(0, "largest resident memory, looked at between steps", 0)
    most_upload_mb: float = _key(0.0, "most that leaves in one round, repeats included", 0)
    most_download_mb: float = _key(0.0, "most that arrives for one round, repeats included", 0)
    rounds_a_day: int = _key(0, "most rounds trained in any 24 hours", 0)
    hours: list[str] = _key([], 'when work may begin, local time: ["22:00-06:00"] ([]: always)')
    least_cohort: int = _key(1, "least number of participants in a round, this one included", 1)
    privacy: Literal["none"] = _key("none", "what the run has to guarantee beyond these rules")
    largest_update: float = _key(
        0.0, "the run has to bound the norm of what a round changes to this or less", 0
    )

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy.toml that only its owner can change; `data` becomes absolute.

        Raises ConfigError with the key and the nearest known one, IdentityError for a file that
        others can change.
        """
        text = read_text(path)
        _require_own(path)
        policy = parse(text, str(path))
        folder = path.absolute().parent
        sources = [absolute_source(source, folder) for source in policy.data]
        base = folder / Path(policy.base).expanduser()
        return dataclasses.replace(
            policy, data=sources, base=str(base) if policy.base and base.exists() else policy.base
        )

    def save(self, path: Path, disk: Disk) -> None:
        """Write it with a comment for every key, for its owner's eyes alone."""
        disk.write(path, write(self).encode(), 0o600)

    def approving(self, terms: Terms) -> Policy:
        """A copy that accepts these terms of this coordinator."""
        return dataclasses.replace(self, coordinator=terms.coordinator, terms=terms.digest)

    def check_terms(self, terms: Terms) -> None:
        """Raise PolicyError, at joining and at every start, for a run outside the rules."""
        if terms.coordinator != self.coordinator:
            raise PolicyError("the terms are of a coordinator that was not approved here", _APPROVE)
        if terms.digest != self.terms:
            raise PolicyError("the run's terms are not those that were approved here", _APPROVE)
        if self.base_digests and terms.base_digest not in self.base_digests:
            raise PolicyError(f"the base model {terms.base_digest[:16]} is not allowed here")
        self._check_settings(terms)

    def _check_settings(self, terms: Terms) -> None:
        clients = terms.config.clients
        if self.most_steps and clients.steps > self.most_steps:
            raise _over("steps a round", clients.steps, self.most_steps)
        if self.largest_update and not 0 < clients.clip_update <= self.largest_update:
            raise PolicyError(
                f"[clients] clip_update = {clients.clip_update:g} bounds updates too little",
                f"more than 0 and at most {self.largest_update:g} here",
            )

    def check_turn(
        self,
        turn: Turn,
        size: int,
        now: datetime,
        used: Used = Used(),  # noqa: B008 (immutable)
        training: bool = True,
    ) -> None:
        """Raise PolicyError for a message of `size` bytes that asks for more than is allowed.

        `now` is local time.  What only concerns training is not held against a measurement.
        """
        self.check_hours(now)
        if self.most_download_mb and used.received + size > self.most_download_mb * MB:
            received = (used.received + size) / MB
            raise _over("MB of messages a round", received, self.most_download_mb)
        if not training:
            return
        if self.most_steps and turn.steps > self.most_steps:
            raise _over("steps a round", turn.steps, self.most_steps)
        if self.rounds_a_day and used.rounds_today >= self.rounds_a_day:
            raise _over("rounds in 24 hours", used.rounds_today + 1, self.rounds_a_day)
        if len(set(turn.cohort)) < self.least_cohort:
            raise PolicyError(
                f"the round has {len(set(turn.cohort))} participants",
                f"at least {self.least_cohort} are required here",
            )

    def check_hours(self, now: datetime) -> None:
        if self.hours and not any(_covers(period, now.time()) for period in self.hours):
            allowed = ", ".join(self.hours)
            raise PolicyError("it is outside the hours when work may begin here", allowed)

    def check_answer(self, size: int, used: Used = Used()) -> None:  # noqa: B008 (immutable)
        """Raise PolicyError for an answer of `size` bytes that must not leave."""
        if self.most_upload_mb and used.sent + size > self.most_upload_mb * MB:
            sent = (used.sent + size) / MB
            raise _over("MB of answers a round", sent, self.most_upload_mb)


_APPROVE = "the participant has to read and approve them first"


def parse(text: str, name: str = "policy.toml") -> Policy:
    """The policy that a file's text describes.  Raises ConfigError."""
    try:
        keys = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    version = keys.pop("format", FORMAT)
    if version != FORMAT:
        raise ConfigError(f"{name} has format {version!r}; this meadow reads format {FORMAT}")
    policy = Policy(**{key: _value(key, value, name) for key, value in keys.items()})
    for period in policy.hours:
        if not _PERIOD.fullmatch(period):
            raise ConfigError(f"{name}: hours has {period!r}", 'expected "HH:MM-HH:MM"')
    return policy


def write(policy: Policy) -> str:
    """The policy as TOML, each key under the comment that explains it."""
    lines = [f"format = {FORMAT}"]
    for part in dataclasses.fields(policy):
        lines += ["", f"# {part.metadata['about']}"]
        lines.append(f"{part.name} = {_toml(getattr(policy, part.name))}")
    return "\n".join(lines) + "\n"


def _value(key: str, value: Any, name: str) -> Any:
    known = {part.name: part for part in dataclasses.fields(Policy)}
    if key not in known:
        raise ConfigError(f"{name}: unknown key {key}", _nearest(key, known))
    where = f"{name}: {key}"
    return checked(value, get_type_hints(Policy)[key], where, known[key].metadata["least"])


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _toml(value: str | float | Sequence[str]) -> str:
    """Text, a number or a list of texts."""
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for surrogate pairs, and TOML wants one more: DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _require_own(path: Path) -> None:
    with explained(path):
        found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:
        raise IdentityError(f"{path} can be changed by others (mode {mode:o})", f"chmod 600 {path}")
    if found.st_uid not in (os.geteuid(), 0):
        raise IdentityError(f"{path} belongs to another user", "take it over, or copy it")


def absolute_source(source: str, folder: Path) -> str:
    """As in run.toml: "nano" is no path, nor is a `datasets:` name that is no folder here."""
    name = source.rpartition("datasets:")[2]
    path = folder / Path(name).expanduser()
    if source == "nano" or (name != source and not path.exists()):
        return source
    return source.removesuffix(name) + str(path)


def _covers(period: str, now: time) -> bool:
    """Whether a period, which may go over midnight, holds a time of day; its end is outside."""
    start, _, end = period.partition("-")
    minute = f"{now.hour:02d}:{now.minute:02d}"
    if start < end:
        return start <= minute < end
    return minute >= start or minute < end


def _over(what: str, found: float, most: float) -> PolicyError:
    return PolicyError(f"the coordinator asks for {found:g} {what}", f"at most {most:g} here")
