"""A version of the registry that somebody uses."""

from __future__ import annotations

from pathlib import Path

from ..closeable import Closeable
from ..errors import AdapterError
from ..peft_adapters.adapter_reader import Adapter
from ..peft_adapters.signed_adapter import Verified
from .registry_folders import VersionFolders
from .registry_leases import Leases
from .registry_rows import Version


class Opened(Closeable):
    """A version in use: it was verified, and is not deleted before this is closed."""

    def __init__(
        self, version: Version, folders: VersionFolders, verified: Verified, leases: Leases
    ) -> None:
        self.version = version
        self.verified = verified
        self._folders = folders
        self._leases: Leases | None = leases

    @property
    def folder(self) -> Path:
        """Where its files are: a standard PEFT adapter."""
        return self._folders.path(self.version.id)

    def read(self) -> Adapter:
        """The adapter, from bytes that still are those that were verified.

        Raises AdapterError where they were changed since.
        """
        files = self._folders.read(self.version.id)
        if files.id != self.version.id:
            raise AdapterError(f"{files.origin} was changed after {self.version} was verified")
        return files.decode()

    def close(self) -> None:
        """It may be deleted from now on, as far as this use of it goes."""
        if self._leases is not None:
            self._leases.give(self.version.id)
            self._leases = None
