"""A new identity key for this user, under the same name at its coordinators.

The new key is on the disk before the coordinator hears of it: whatever is interrupted, the same
command goes on, and one of the two keys is the one that counts.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, GatewayError, MeadowError
from ..identity import Identity, default_path
from ..store import Disk
from .gateway_client import Enrolment, GatewayClient
from .joining import memberships
from .membership import Membership


def rotate_key(folder: Path, disk: Disk) -> str:
    """Replace this user's key in the membership of `folder`; the new fingerprint.

    Raises GatewayError where the coordinator refuses or cannot be reached; then the old key stays.
    """
    path = default_path()
    others = [other for other in memberships() if other != folder]
    if others:
        raise ConfigError(
            f"this key is also that of {others[0]}, which would not follow", "leave that run first"
        )
    old, new = Identity.load_or_create(path), Identity.load_or_create(_next(path))
    membership = Membership.load(folder)
    enrolment = _rotated(membership, old, new)
    membership.with_certificate(enrolment.certificate).save(folder, disk)
    disk.rename(_next(path), path)
    disk.sync_folder(path.parent)
    return enrolment.fingerprint


def _rotated(membership: Membership, old: Identity, new: Identity) -> Enrolment:
    """What the coordinator answers; also where it had agreed just before a crash."""
    try:
        with GatewayClient(membership, old) as gateway:
            return gateway.rotate(new)
    except GatewayError as error:
        if error.status not in (401, 403):
            raise
        refused: MeadowError = error
    try:
        with GatewayClient(membership.with_certificate(""), new) as gateway:
            return gateway.renew()
    except MeadowError:
        raise refused from None


def _next(path: Path) -> Path:
    return path.with_name("identity-next.pem")
