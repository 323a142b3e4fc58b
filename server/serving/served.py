"""Which weights answer: the base, or one version of an adapter."""

from __future__ import annotations

from dataclasses import dataclass

_FINGERPRINT = 12  # hexadecimal digits


@dataclass(frozen=True)
class Served:
    """The base model, or the version that a model's name meant when a request arrived."""

    name: str
    version: str = ""  # "v7"; "" for the base
    digest: str = ""  # SHA-256 of the version's files, in full; "" for the base
    alias: str = ""  # through which it was named, if through one

    @property
    def is_base(self) -> bool:
        return not self.digest

    @property
    def fingerprint(self) -> str:
        """The digest's first digits; "base" for the base."""
        return self.digest[:_FINGERPRINT] or "base"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name
