"""Another identity key under the same name: the old one's successor, at every coordinator.

The new key lies beside the old one, durably, before any coordinator hears of it, and takes its
place when all have agreed.  Whatever is cut short on the way is finished by the next attempt: a
coordinator that is asked again for the same pair of keys says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from ..errors import GatewayError
from ..identity import Identity
from ..store import Disk, explained
from .gateway_client import GatewayClient
from .membership import Membership


def next_path(identity: Path) -> Path:
    """Where the successor of a key lies until it takes its place."""
    return identity.with_name(f"next-{identity.name}")


def rotate_identity(identity: Path, folders: Sequence[Path], disk: Disk | None = None) -> Identity:
    """Replace the key at `identity`, which the memberships in `folders` are of; the new one.

    Raises GatewayError where a coordinator cannot be reached, before any has heard of it, or
    refuses: run it again.  Until it has returned, those who have agreed know only the new key.
    """
    disk = disk or Disk()
    old = Identity.load_or_create(identity, disk)
    new = Identity.load_or_create(next_path(identity), disk)
    behind = [folder for folder in folders if not _is_of(Membership.load(folder), new)]
    for folder in behind:
        _require_answer(folder, old)
    for folder in behind:
        membership = Membership.load(folder)
        with GatewayClient(membership, old) as client:
            found = client.rotate(new)
        if not found.certificate:
            raise GatewayError(f"{found.name} is {found.status} at {membership.addresses[0]}")
        _certify(folder, found.certificate, disk)
    with explained(identity):
        disk.rename(next_path(identity), identity)
    disk.confirm(identity.parent)
    return new


def _require_answer(folder: Path, identity: Identity) -> None:
    """Raise GatewayError unless the coordinator of a membership answers: one that is gone for good
    must not keep a new key from coming to those that have heard of it already."""
    try:
        with GatewayClient(Membership.load(folder), identity) as client:
            client.open_session("")
    except GatewayError as error:
        hint = f"if that run is over: meadow client leave --folder {folder}"
        raise GatewayError(error.message, hint, error.status) from error


def _certify(folder: Path, certificate: str, disk: Disk) -> None:
    Membership.change(folder, disk, lambda now: now.with_certificate(certificate))


def _is_of(membership: Membership, identity: Identity) -> bool:
    certificate = x509.load_pem_x509_certificate(membership.certificate.encode())
    return bool(certificate.public_key() == identity.public)
