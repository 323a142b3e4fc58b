"""Taking part in a run: what `meadow client join` makes on the participant's machine, and what it
tells its user before anything is agreed to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from ..errors import ConfigError, FormatError, IdentityError, ModelError
from ..identity import default_path
from ..peft_adapters.blueprint import Blueprint, open_blueprint
from ..store import Disk, explained
from ..strategies.registry import make
from .home import FLOWER_KEY, MEMBERSHIP, OUTGOING, POLICY, TERMS
from .membership import Membership
from .policy import Policy
from .terms import Terms

_OWNER_ONLY = 0o600


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


def make_folder(folder: Path, disk: Disk) -> None:
    """The participant's folder, which nobody else can enter."""
    disk.folder(folder)
    with explained(folder):
        folder.chmod(0o700)


def flower_key(folder: Path, disk: Disk) -> str:
    """The public key (PEM) that Flower knows this participant by; the pair is made once."""
    file = folder / FLOWER_KEY
    if not file.exists():
        made = generate_private_key(SECP384R1())
        text = made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        disk.write(file, text, _OWNER_ONLY)
    try:
        with explained(file):
            key = load_ssh_private_key(file.read_bytes(), password=None)
    except ValueError as error:
        raise IdentityError(f"{file} holds no readable key", "delete it and join anew") from error
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def local_base(terms: Terms, base: str) -> Blueprint:
    """The base model on this machine, which has to be the run's.

    Raises ModelError where there is none, FormatError where it is another.
    """
    model = terms.config.model
    name = base or model.base
    try:
        found = open_blueprint(terms.config.replace(model={"base": name}).model)
    except ModelError as error:
        raise ModelError(str(error), "name its folder on this machine with --base") from error
    if found.digest != terms.base_digest:
        raise FormatError(
            f"the base model {name} is another than the run's", "name the right one with --base"
        )
    return found


def rules_of(folder: Path, data: Sequence[str], base: str) -> Policy:
    """The participant's rules as they stand, with text and base model of this machine."""
    rules = Policy.load(folder / POLICY) if (folder / POLICY).exists() else Policy()
    sources = [str(Path(source).resolve()) for source in data] or list(rules.data)
    own_base = str(Path(base).resolve()) if base else rules.base
    return dataclasses.replace(rules, data=sources, base=own_base)


def approve(folder: Path, terms: Terms, text: bytes, rules: Policy, disk: Disk) -> None:
    """Write down what the participant agreed to: the rules, then the terms (`text`)."""
    rules.approving(terms).save(folder / POLICY, disk)
    disk.write(folder / TERMS, text)
    dataclasses.replace(Membership.load(folder), terms=terms.digest).save(folder, disk)


def leave(folder: Path) -> None:
    """Delete the membership with its keys; the log of what has left the machine stays."""
    kept = (OUTGOING, f"{OUTGOING}.head")
    with explained(folder):
        for path in folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def explanation(terms: Terms, blueprint: Blueprint, data: Sequence[str]) -> Iterator[str]:
    """What will happen, for a person to read before it does."""
    config = terms.config
    strategy = make(
        config.strategy.name,
        config.strategy.options,
        blueprint.layers,
        config.model.rank,
        config.scaling,
        blueprint.digest,
    )
    yield f"run            {terms.run[:16]} of coordinator key {terms.coordinator[:16]}"
    yield f"base model     {config.model.base} (digest {terms.base_digest[:16]})"
    yield f"text           {', '.join(data)}: it stays on this machine"
    yield (
        f"training       {config.rounds.count} rounds of {config.clients.steps} steps,"
        f" {config.clients.batch} rows each, strategy {strategy.name}: {strategy.summary}"
    )
    for what in leaving(strategy.integers, config.clients.clip_update):
        yield f"leaves         {what}"
    yield "never leaves   text, tokens, the base model, optimiser state"
    yield "privacy        updates are not encrypted towards the coordinator, and no noise is added"


def leaving(integers: bool, clip: float) -> Iterator[str]:
    """What is sent in each round."""
    if integers:
        yield "one byte for each step"
    else:
        bound = f", its norm at most {clip:g}" if clip else ""
        yield f"an update of the adapter's weights{bound}"
    yield "the training loss, the held-out loss, and how many rows and tokens they are of"
