"""What a participant keeps of its enrolment: where the coordinator is, and the proof that it may
come in.

`membership.json` is the participant's own; a coordinator that moves is followed by editing its
addresses, which the forwarder notices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from ssl import DER_cert_to_PEM_cert
from typing import Any

from cryptography import x509

from ..address import split_address
from ..errors import FormatError
from ..file_lock import own_turn
from ..invitation import Invitation
from ..store import Disk
from .home import MEMBERSHIP, MEMBERSHIP_LOCK, read_text

FORMAT = 1
_AGAIN = "`meadow client join` writes it"


@dataclass(frozen=True)
class Membership:
    """One participant's at one coordinator."""

    name: str
    addresses: tuple[str, ...]
    """"host:port" of the gateway, each to be tried in turn."""
    authority: str
    """Who vouches for the gateway (PEM); "" = those the system trusts."""
    token: str
    """The invitation's, in hexadecimal: with it an expired certificate is replaced."""
    certificate: str = ""
    """PEM; "" before the operator's approval."""
    node_id: str = ""
    """Flower's name for this participant's SuperNode, decimal; "" before approval."""
    terms: str = ""
    """Digest of the terms that were approved."""

    @classmethod
    def of(cls, invitation: Invitation) -> Membership:
        """What an invitation says, before enrolment."""
        authority = DER_cert_to_PEM_cert(invitation.authority) if invitation.authority else ""
        token = invitation.token.hex()
        return cls(invitation.name, invitation.addresses, authority, token)

    @classmethod
    def load(cls, folder: Path) -> Membership:
        """Raises ConfigError where there is none, FormatError for one that cannot be used."""
        path = folder / MEMBERSHIP
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str = MEMBERSHIP) -> Membership:
        try:
            fields = json.loads(text)
            if fields.pop("format", None) != FORMAT:
                raise FormatError(f"{where} is not of format {FORMAT}", _AGAIN)
            found = cls(**fields | {"addresses": tuple(fields["addresses"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{where} cannot be read", _AGAIN) from error
        values = dataclasses.asdict(found)
        texts = [*values.pop("addresses"), *values.values()]
        if not found.addresses or not all(isinstance(text, str) for text in texts):
            raise FormatError(f"{where} has a value of another type", _AGAIN)
        for address in found.addresses:
            split_address(address)
        return found

    @classmethod
    def change(
        cls,
        folder: Path,
        disk: Disk,
        change: Callable[[Membership], Membership],
        first: Membership | None = None,
    ) -> Membership:
        """What `change` makes of the membership as it is now, which is written down; `first`, where
        there is none.

        The forwarder and the commands of the user change it: they take turns, so that neither
        overwrites what the other wrote.  Errors as of `load`.
        """
        with own_turn(folder / MEMBERSHIP_LOCK):
            if first is None or (folder / MEMBERSHIP).exists():
                first = cls.load(folder)
            after = change(first)
            after.save(folder, disk)
        return after

    def save(self, folder: Path, disk: Disk) -> None:
        """Durable on return, and readable to its owner alone; for who has the turn."""
        fields: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(self)}
        disk.write(folder / MEMBERSHIP, json.dumps(fields, indent=1).encode() + b"\n", 0o600)

    def with_certificate(self, certificate: str) -> Membership:
        return dataclasses.replace(self, certificate=certificate)

    def lifetime(self) -> tuple[float, float]:
        """From when to when (Unix seconds) the certificate holds.  FormatError for none."""
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate.encode())
        except ValueError as error:
            raise FormatError(f"{MEMBERSHIP} holds no certificate", _AGAIN) from error
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return begins.timestamp(), ends.timestamp()
