"""Taking part in a run: what `meadow client join` makes on the participant's machine, and what
`meadow client leave` takes away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from ..errors import ConfigError, DataError, GatewayError, IdentityError
from ..fingerprint import fingerprint
from ..identity import Identity, default_path
from ..invitation import Invitation
from ..store import Disk, explained, locked
from ..terms import Terms
from .gateway_client import Enrolment, GatewayClient
from .home import LOCK, MEMBERSHIP, OUTGOING, POLICY, SOCKET, TERMS
from .membership import Membership
from .participant_text import is_missing
from .policy import Policy, absolute_source
from .trainer_link import target

ASK_SECONDS = 1.0
"""How often the coordinator is asked whether its operator has approved."""


# --- folders -------------------------------------------------------------------------------------


def clients_folder() -> Path:
    """Where this user's memberships are, one folder each."""
    return default_path().parent / "clients"


def folder_of(name: str) -> Path:
    """The folder for a participant of this name; any name is a safe and short one there."""
    plain = quote(name, safe="")
    if len(plain) > 40:
        plain = f"{plain[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return clients_folder() / plain


def memberships() -> list[Path]:
    """The folders of all this user's memberships."""
    return sorted(path.parent.resolve() for path in clients_folder().glob(f"*/{MEMBERSHIP}"))


def only_membership() -> Path:
    """The folder of this user's one membership.  Raises ConfigError for none and for several."""
    found = memberships()
    if not found:
        raise ConfigError("this user has joined no run", "meadow client join INVITATION --data DIR")
    if len(found) > 1:
        raise ConfigError(
            f"this user has joined {len(found)} runs", f"--folder {found[0]}, or another of them"
        )
    return found[0]


def require_folder(folder: Path, file: str = MEMBERSHIP) -> Path:
    """The folder, if it is a participant's.  Raises ConfigError unless `file` is in it."""
    if not (folder / file).exists():
        raise ConfigError(f"{folder} is no participant's folder", _JOIN)
    return folder


_JOIN = "`meadow client join INVITATION --data DIR` makes one"


def make_folder(folder: Path, disk: Disk) -> None:
    """The participant's folder, which nobody else can enter.  Raises ConfigError where its name is
    too long for the trainer's socket."""
    target(folder / SOCKET)
    disk.folder(folder)
    with explained(folder):
        folder.chmod(0o700)


# --- enrolment -----------------------------------------------------------------------------------


def begun(folder: Path, invitation: Invitation) -> Membership:
    """The membership that an invitation begins, or goes on with.

    Raises ConfigError where the folder is that of another enrolment.
    """
    fresh = Membership.of(invitation)
    if not (folder / MEMBERSHIP).exists():
        return fresh
    known = Membership.load(folder)
    if known.token != fresh.token:
        raise ConfigError(
            f"{folder} is {known.name}'s already, by another invitation",
            f"meadow client leave --folder {folder}, or join with another --folder",
        )
    return dataclasses.replace(known, addresses=fresh.addresses)


def enrol(
    gateway: GatewayClient,
    identity: Identity,
    flower_key: str,
    waiting: Callable[[], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Enrolment:
    """Enrol, and ask until the operator has approved; `waiting` is called once if that takes time.

    Raises GatewayError where the gateway refuses, or has no answer at the beginning; IdentityError
    where it has put down another key than ours.
    """
    found = gateway.enrol(flower_key)
    if found.fingerprint != own_fingerprint(identity):
        raise IdentityError(
            "the coordinator has another key under this invitation than this machine's",
            "tell the operator: somebody is between you",
        )
    if not found.certificate:
        waiting()
    while not found.certificate:
        sleep(ASK_SECONDS)
        found = _asked_again(gateway, flower_key) or found
    return found


def own_fingerprint(identity: Identity) -> str:
    """What the operator has to see as well; computed here, whatever the gateway says."""
    return fingerprint(identity.public.public_bytes_raw())


def _asked_again(gateway: GatewayClient, flower_key: str) -> Enrolment | None:
    """Where the enrolment stands; None while the gateway is away, or cannot say."""
    try:
        return gateway.enrol(flower_key)
    except GatewayError as error:
        if not error.may_pass:
            raise
        return None


def admit(folder: Path, membership: Membership, found: Enrolment, disk: Disk) -> None:
    """Write down what the coordinator has given to who enrolled with `membership`."""

    def admitted(now: Membership) -> Membership:
        certified = now.with_certificate(found.certificate)
        return dataclasses.replace(certified, addresses=membership.addresses, node_id=found.node_id)

    Membership.change(folder, disk, admitted, membership)


# --- consent -------------------------------------------------------------------------------------


def rules_of(folder: Path, data: Sequence[str], base: str) -> Policy:
    """The participant's rules as they stand, with text and base model of this machine.

    Raises DataError where there is no text.
    """
    rules = Policy.load(folder / POLICY) if (folder / POLICY).exists() else Policy()
    sources = [absolute_source(source, Path.cwd()) for source in data] or list(rules.data)
    require_text(sources)
    own_base = Path(base).expanduser()
    chosen = str(own_base.resolve()) if base and own_base.exists() else base
    return dataclasses.replace(rules, data=sources, base=chosen or rules.base)


def require_text(sources: Sequence[str]) -> None:
    """Raise DataError where one of the sources is not there or holds no file."""
    for source in sources:
        if is_missing(source):
            raise DataError(
                f"there is no text at {source}", "--data takes a file, a folder or a pattern"
            )


def approve(folder: Path, terms: Terms, text: bytes, rules: Policy, disk: Disk) -> None:
    """Write down what the participant agreed to: the rules, then the terms (`text`)."""
    rules.approving(terms).save(folder / POLICY, disk)
    disk.write(folder / TERMS, text)
    Membership.change(folder, disk, lambda now: dataclasses.replace(now, terms=terms.digest))


def leave(folder: Path) -> None:
    """Delete the membership with its keys; the log of what has left the machine stays.

    The membership goes last, so that what was interrupted can be done again.  Raises JournalError
    while the daemon runs.
    """
    kept = (OUTGOING, f"{OUTGOING}.head", LOCK, MEMBERSHIP)
    with locked(folder / LOCK, "stop its daemon first"), explained(folder):
        for path in folder.iterdir():
            if path.name not in kept:
                _remove(path)
        (folder / MEMBERSHIP).unlink(missing_ok=True)
        (folder / LOCK).unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
