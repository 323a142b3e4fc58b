"""Canary prompts: what a version must say, and must not, before it is served.

A file of them is TOML with a [[canary]] for each, or JSON lines:

    [[canary]]
    prompt = "What is a loom?"       # or `text`: a beginning to go on from, as it stands
    contains = ["weav"]              # each of these
    matches = "^A "                  # and this regular expression, somewhere
    lacks = ["I cannot", "As an AI"] # and none of these
    tokens = 32                      # at most so many are generated

Answers are generated greedily, so that the same version always gives the same one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..config_values import checked, nearest
from ..errors import ConfigError
from ..prompt_text import joint

MOST_TOKENS = 4096
_SHOWN = 60


@dataclass(frozen=True)
class Canary:
    """One prompt and what its answer has to be."""

    prompt: str = ""
    text: str = ""
    contains: tuple[str, ...] = ()
    matches: str = ""
    lacks: tuple[str, ...] = ()
    tokens: int = 32

    @property
    def asked(self) -> str:
        return self.prompt or self.text

    @property
    def plain(self) -> str:
        """What a model without a chat template reads."""
        return self.text or self.prompt + joint(self.prompt)

    def faults(self, answer: str) -> list[str]:
        """What is wrong with an answer, for the operator; nothing where it passes."""
        said = f"{_short(self.asked)} was answered {_short(answer)}"
        wrong = [f"lacks {_short(part)}" for part in self.contains if part not in answer]
        wrong += [f"has {_short(part)}" for part in self.lacks if part in answer]
        if self.matches and not re.search(self.matches, answer):
            wrong.append(f"does not match {_short(self.matches)}")
        return [f"canary {said}, which {fault}" for fault in wrong]


def read_canaries(path: Path) -> list[Canary]:
    """The canaries of a file, TOML where its name ends so.  Raises ConfigError with the place."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    tables = _toml(text, path) if path.suffix == ".toml" else _json_lines(text, path)
    if not tables:
        raise ConfigError(f"{path} holds no canary", "a [[canary]] for each prompt")
    return [_canary(table, where) for where, table in tables]


def _toml(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if set(tables) - {"canary"} or not isinstance(tables.get("canary", []), list):
        raise ConfigError(f"{path} holds something else than canaries", "a [[canary]] for each")
    return [(f"{path} canary {n}", table) for n, table in enumerate(tables.get("canary", []), 1)]


def _json_lines(text: str, path: Path) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((f"{path} line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} line {number} is not JSON") from error
    return found


def _canary(table: Any, where: str) -> Canary:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is no table of keys")
    known, hints = {part.name: part for part in fields(Canary)}, get_type_hints(Canary)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}", nearest(key, known))
        listed = key in ("contains", "lacks")
        kind = list[str] if listed else hints[key]
        least, most = (1, MOST_TOKENS) if key == "tokens" else (None, None)
        given = [value] if listed and isinstance(value, str) else value
        found = checked(given, kind, f"{where}: {key}", least, most)
        values[key] = tuple(found) if listed else found
    return _sensible(Canary(**values), where)


def _sensible(canary: Canary, where: str) -> Canary:
    if bool(canary.prompt) == bool(canary.text):
        raise ConfigError(f"{where} has neither or both of prompt and text", "give one of them")
    if not (canary.contains or canary.matches or canary.lacks):
        raise ConfigError(f"{where} would pass whatever is said", "contains, matches or lacks")
    if "" in canary.contains + canary.lacks:
        raise ConfigError(f"{where} asks for empty text", "remove it")
    try:
        re.compile(canary.matches)
    except (re.error, RecursionError) as error:
        raise ConfigError(f"{where}: matches is no regular expression: {error}") from error
    return canary


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return repr(shown)
