"""What adapters, aliases and versions are called, and how a text refers to one.

    NAME                   where its alias `prod` points
    NAME@ALIAS             where another alias points
    NAME@v7                the seventh version that was published under this name
    NAME@sha256:ab12...    the version of this digest; 12 digits or more

NAME is `adapter` or `tenant/adapter`.  Such a text may come from anybody: it is looked up, and
never made part of a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RegistryError

PROD = "prod"
SHORTEST_DIGEST = 12

_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w.-]{0,63}(/[A-Za-z0-9_][\w.-]{0,63})?", re.ASCII)
_ALIAS = re.compile(r"(?!v\d+$)[A-Za-z][A-Za-z0-9_-]{0,63}")
_NUMBER = re.compile(r"v([1-9]\d{0,8})", re.ASCII)
_DIGEST = re.compile(rf"sha256:([0-9a-f]{{{SHORTEST_DIGEST},64}})")


@dataclass(frozen=True)
class Reference:
    """A name, and one of an alias, a number and the beginning of a digest."""

    name: str
    alias: str = ""
    number: int = 0
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises RegistryError for what refers to nothing in any registry."""
        name, mark, rest = text.partition("@")
        name = adapter_name(name)
        if not mark:
            return cls(name, alias=PROD)
        if found := _NUMBER.fullmatch(rest):
            return cls(name, number=int(found[1]))
        if found := _DIGEST.fullmatch(rest):
            return cls(name, digest=found[1])
        return cls(name, alias=alias_name(rest))

    def __str__(self) -> str:
        if self.number:
            return f"{self.name}@v{self.number}"
        return f"{self.name}@{self.alias or f'sha256:{self.digest}'}"


def adapter_name(text: str) -> str:
    """`text`, if an adapter can be called so.  Raises RegistryError."""
    if not _NAME.fullmatch(text):
        raise RegistryError(
            f"{text[:80]!r} cannot be an adapter's name",
            "NAME or TENANT/NAME: letters, digits, - _ . and at most 64 of them each",
        )
    return text


def alias_name(text: str) -> str:
    """`text`, if an alias can be called so.  Raises RegistryError."""
    if not _ALIAS.fullmatch(text):
        raise RegistryError(
            f"{text[:80]!r} is no version and cannot be an alias",
            f"v7, sha256: and {SHORTEST_DIGEST} digits or more, or a word like {PROD}",
        )
    return text
