"""Flower's SuperLink and SuperExec as the engine underneath a coordinator.

They listen on this machine alone.  `--isolation process` keeps a run alive while the SuperLink is
restarted, and a secret keeps other users of the machine from taking the server app's work.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from ..errors import FlowerError
from ..file_lock import own_turn
from ..flower_commands import (
    bundle_digest,
    bundle_in,
    environment,
    program,
    run,
    write_project,
)
from ..listening import is_free
from ..processes import Program, free_port
from ..store import Disk, explained
from .authority import Authority

_SITE = "meadow"  # the name of our SuperLink in Flower's own configuration
_IN_USE = "already in use"  # Flower 1.41 of a key that it has registered


class FlowerEngine:
    """One SuperLink and what is needed to speak with it.  `prepare` comes first, once a start."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk
        disk.folder(folder)
        self.port = self._port()
        self.authority_file = folder / "authority.pem"
        self.environment = environment(folder / "flwr")

    def prepare(self, authority: Authority) -> None:
        """Write the certificate, the secret and Flower's own configuration."""
        self._keep_port()
        certificate, key = authority.issue_local()
        self._disk.write(self.authority_file, authority.certificate)
        self._disk.write(self._folder / "certificate.pem", certificate)
        self._disk.write(self._folder / "key.pem", key, 0o600)
        if not (self._folder / "secret").exists():
            self._disk.write(self._folder / "secret", secrets.token_bytes(32), 0o600)
        self._disk.folder(self._folder / "flwr")
        site = (
            f'[superlink]\ndefault = "{_SITE}"\n\n[superlink.{_SITE}]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f"root-certificates = {_toml(self.authority_file.resolve())}\n"
        )
        self._disk.write(self._folder / "flwr" / "config.toml", site.encode())

    def bundle_digest(self) -> str:
        """SHA-256, in hexadecimal, of the bundle of entry points that travels."""
        return bundle_digest(bundle_in(self._folder, self._disk))

    def superlink(self) -> Program:
        command = [
            program("flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.authority_file)),
            *("--ssl-certfile", str(self._folder / "certificate.pem")),
            *("--ssl-keyfile", str(self._folder / "key.pem")),
            *("--database", str(self._folder / "state.db")),
            *("--superexec-auth-secret-file", str(self._folder / "secret")),
            *("--isolation", "process", "--enable-supernode-auth"),
            "--disable-runtime-dependency-installation",
        ]
        return Program("superlink", lambda: command, self.environment, port=self.port)

    def superexec(self, home: Path) -> Program:
        """The executor, which starts the server app for the run in `home`."""
        command = [
            program("flower-superexec"),
            *("--runtime-api-address", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.authority_file)),
            *("--superexec-auth-secret-file", str(self._folder / "secret")),
        ]
        variables = {**self.environment, "MEADOW_COORDINATOR": str(home)}
        return Program("superexec", lambda: command, variables)

    def registering(self) -> AbstractContextManager[None]:
        """One approval at a time, whichever process makes it: until the roster has its node, it is
        the one that nobody was given."""
        return own_turn(self._folder / "registering.lock")

    def register(self, flower_key: str, known: Collection[int]) -> int:
        """Admit a SuperNode by its public key (PEM); its node id.  Raises FlowerError.

        `known` are the nodes that participants have, or had: a key that was registered just before
        a crash is the one node that nobody was ever given.
        """
        file = self._folder / "registering.pub"
        key = load_pem_public_key(flower_key.encode())
        self._disk.write(file, key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        try:
            return int(self._flwr("supernode", "register", str(file))["node-id"])
        except FlowerError as error:
            if _IN_USE not in str(error):
                raise  # it may be registered or not: nothing can be told from what others have
            rows = self._flwr("supernode", "list")["nodes"]
            unclaimed = {int(row["node-id"]) for row in rows}.difference(known)
            if len(unclaimed) != 1:
                raise
            return unclaimed.pop()

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        return run([*arguments, _SITE], self.environment, self._folder)

    def start_run(self) -> int:
        """Begin a Flower run of the bundle; its id.  Raises FlowerError."""
        project = write_project(self._folder, self._disk)
        return int(self._flwr("run", str(project))["run-id"])

    def stop_run(self, run_id: int) -> None:
        """End a Flower run whose server app is gone.  Raises FlowerError."""
        self._flwr("stop", str(run_id))

    def _port(self) -> int:
        """The SuperLink's port: kept, so that what waits for it finds it again."""
        file = self._folder / "port"
        if not file.exists():
            self._disk.write(file, str(free_port()).encode())
        with explained(file):
            return int(file.read_text())

    def _keep_port(self) -> None:
        """Take another port where a program of somebody else's has ours by now."""
        if not is_free("127.0.0.1", self.port):
            self.port = free_port()
            self._disk.write(self._folder / "port", str(self.port).encode())


def _toml(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
